"""The Ray Serve application: stateless ingresses in front of a detached pipeline.

    serve run serve_app/config.yaml        serve deploy serve_app/config.yaml        serveConfigV2 of a RayService

An ingress parses HTTP, applies the chat template, tokenises, and streams; it holds one socket to the pipeline's
Head, so no token crosses a Serve handle. It is ready when the pipeline has generated a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from serve_app.api.app import create_app
from serve_app.api.auth import ApiKeys
from serve_app.api.generator import ServedModel
from serve_app.api.text import TextCodec
from serve_app.choices import check_choices, index_of, store_of
from serve_app.cluster.audit_specs import AUDITOR
from serve_app.cluster.named_actors import find_actor
from serve_app.cluster.supervisor import supervisor_of
from serve_app.config import AppConfig
from serve_app.errors import PipelineError
from serve_app.pipeline.head_client import HeadClient
from serve_app.pipeline.head_server import LOOPBACK
from serve_app.serve_file import refuse_exposure
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.catalog import open_model
from shard_tools.fetch import read_file
from shard_tools.index.seen import SeenVersions

_log = logging.getLogger("ray.serve")
_RENEW_S = 1.0
_POLL_S = 0.1
_LOOKUP_S = 10.0
_MOST_AUTO = 256  # requests that run at once, at most, where the config leaves it to the device


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's entry: `import_path: serve_app.cluster.application:build`. Raises ConfigError for bad args."""
    config = AppConfig.parse(args)
    check_choices(config)
    running = config.pipeline.max_requests
    deployment = Ingress.options(
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": 0.1} | _labels(config.ingress.node_labels),
        max_ongoing_requests=(_MOST_AUTO if running == "auto" else running) + config.pipeline.max_waiting + 64,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(args)


def _keys(config: AppConfig) -> ApiKeys:
    keys = config.ingress.api_keys
    return ApiKeys() if keys is None else ApiKeys.load(keys.file, keys.sha256)


def _labels(labels: dict[str, str]) -> dict[str, Any]:
    return {"label_selector": labels} if labels else {}


class _Ingress:
    """One HTTP door. The limit of requests is the Head's, which refuses with 429; Serve's lies above it."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._args, self._config = args, AppConfig.parse(args)
        refuse_exposure(_listening_host(), self._config)
        self._name, self._began = uuid.uuid4().hex, time.time()
        self._supervisor = supervisor_of(args)
        self._renewing = asyncio.get_running_loop().create_task(self._renew())
        self._client = HeadClient(self._locate)
        self._client.start()
        model = self._config.model
        store = store_of(model.store)
        manifest = open_model(
            model.name,
            index_of(model),
            store,
            model.publishers(),
            int(time.time()),
            SeenVersions(self._config.identity.seen),
        )
        self._model = ServedModel(
            name=manifest.name,
            manifest=manifest.cid,
            context_length=manifest.context_length,
            created_s=int(time.time()),
            text=TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files}),
        )
        waited = 0.0
        while not await self._client.ready():
            await asyncio.sleep(_POLL_S)
            waited += _POLL_S
            if waited % 10 < _POLL_S:
                _log.info("waiting for the pipeline's first token: %s", self._client.status().get("problem", "loading"))

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(
            {self._model.name: self._model},
            self._client,
            _keys(self._config),
            self._config.ingress.max_body_bytes,
            _AuditorsReceipts() if self._config.audit.on else None,
        )

    async def __del__(self) -> None:
        self._renewing.cancel()
        self._client.close()
        try:
            await self._supervisor.release.remote(self._name)
        except RayError:
            pass  # it has ended before

    async def _locate(self) -> LinkAddress:
        try:
            address: LinkAddress = await self._supervisor.head_address.remote()
            beside_us = address.host == get_node_ip_address()
            return replace(address, host=LOOPBACK) if beside_us else address
        except RayError as e:
            cause = getattr(e, "cause", None)
            raise PipelineError(str(cause or "the supervisor does not answer").splitlines()[0]) from e

    async def _renew(self) -> None:
        while True:
            try:
                await self._supervisor.lease.remote(self._name, self._args, self._began)
            except RayError:
                _log.warning("the supervisor does not answer; making sure there is one")
                self._supervisor = supervisor_of(self._args)
            await asyncio.sleep(_RENEW_S)


class _AuditorsReceipts:
    """Implements api/receipts.py's Receipts by the cluster's auditor, whichever it is now."""

    def __init__(self) -> None:
        self._auditor: Any | None = None

    async def lookup(self, id: str) -> dict[str, Value] | None:
        try:
            if self._auditor is None:
                self._auditor = await asyncio.to_thread(find_actor, AUDITOR)
            if self._auditor is None:
                raise PipelineError("no auditor is there now, who would know; serving goes on without. Try again soon")
            async with asyncio.timeout(_LOOKUP_S):
                found: dict[str, Value] | None = await self._auditor.lookup.remote(id)
                return found
        except (RayError, TimeoutError) as e:
            self._auditor = None
            raise PipelineError("the auditor does not answer; serving goes on without. Try again soon") from e


Ingress: Any = serve.deployment(name="ingress")(serve.ingress()(_Ingress))


def _listening_host() -> str:
    """Where this cluster's Serve listens, as its controller knows it. Not a public call of Serve's; where it is gone,

    0.0.0.0 is assumed, and then API keys are asked for.
    """
    try:
        from ray.serve.context import _get_global_client

        return str(_get_global_client().http_config.host)
    except Exception:
        _log.warning("this Ray Serve does not say where it listens; assuming every address")
        return "0.0.0.0"
