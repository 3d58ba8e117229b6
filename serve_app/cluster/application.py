"""The Ray Serve application: stateless ingresses in front of detached pipelines.

    serve run serve_app/config.yaml        serve deploy serve_app/config.yaml        serveConfigV2 of a RayService

An ingress parses HTTP, applies the chat template, tokenises, and streams; it holds one socket to each pipeline's
Head, so no token crosses a Serve handle. It is ready when one pipeline has generated a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from serve_app.api.app import create_app
from serve_app.api.auth import ApiKeys
from serve_app.api.generator import ServedModel
from serve_app.api.text import TextCodec
from serve_app.choices import check_choices, store_of
from serve_app.cluster.actors import kill_processes
from serve_app.cluster.audit_specs import AUDITOR
from serve_app.cluster.named_actors import find_actor
from serve_app.cluster.specs import Place
from serve_app.cluster.supervisor import supervisor_of
from serve_app.cluster.version import version_of
from serve_app.config import AppConfig
from serve_app.errors import PipelineError, ReplacedError
from serve_app.pipeline.head_server import LOOPBACK
from serve_app.pipeline.pipelines import Pipelines
from serve_app.serve_file import refuse_exposure
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.catalog import open_record
from shard_tools.errors import LlmdError
from shard_tools.fetch import read_file
from shard_tools.index.model_index import ModelRecord

_log = logging.getLogger("ray.serve")
_RENEW_S = 1.0
_POLL_S = 0.1
_HANGS_S = 15.0  # a Supervisor that keeps an ingress waiting for so long; its calls to Ray take a second at most
_AGREE_TRIES = 60
_LOOKUP_S = 10.0
_MOST_AUTO = 256  # requests that run at once, at most, where the config leaves it to the device
_TO_REFUSE = 64  # more than the Heads have room for: they say why, and when to come again
# Serve takes a door away after three checks in a row without an answer: 9 s, not the 90 of its defaults, in which every
# request sent to a stopped door hangs. Not less: a door that is only busy would take its streams along.
_HEALTH_EVERY_S, _HEALTH_S = 1.0, 3.0


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's entry: `import_path: serve_app.cluster.application:build`. Raises ConfigError for bad args."""
    config = AppConfig.parse(args)
    check_choices(config)
    running = config.pipeline.max_requests
    held = (_MOST_AUTO if running == "auto" else running) + config.pipeline.max_waiting
    at_once = held * config.pipeline.replicas + _TO_REFUSE
    deployment = Ingress.options(
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": 0.1} | _labels(config.ingress.node_labels),
        max_ongoing_requests=at_once,
        max_queued_requests=at_once,  # a burst that the doors have room for passes through this queue too
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        health_check_period_s=_HEALTH_EVERY_S,
        health_check_timeout_s=_HEALTH_S,
        graceful_shutdown_timeout_s=config.ingress.drain_s,
    )
    return deployment.bind(args)


def _keys(config: AppConfig) -> ApiKeys:
    keys = config.ingress.api_keys
    return ApiKeys() if keys is None else ApiKeys.load(keys.file, keys.sha256)


def _labels(labels: dict[str, str]) -> dict[str, Any]:
    return {"label_selector": labels} if labels else {}


class _Ingress:
    """One HTTP door. The limit of requests is the Heads', which refuse with 429; Serve's, also 429, lies above it."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._args, self._config = args, AppConfig.parse(args)
        refuse_exposure(_listening_host(), self._config)
        self._name, self._began = uuid.uuid4().hex, time.time()
        self._version, self._record = version_of(self._config), None
        self._replicas = self._config.pipeline.replicas
        self._supervisor = supervisor_of(args, self._version)
        self._renewing = asyncio.get_running_loop().create_task(self._renew())
        self._client = Pipelines([partial(self._locate, replica) for replica in range(self._replicas)])
        self._client.start()
        model = self._config.model
        store = store_of(model.store)
        self._record = await self._agree()
        manifest = open_record(self._record, store, model.publishers())
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

    async def _agree(self) -> ModelRecord:
        """Which release of the model this version serves: the name may lead to a later one by now.

        Raises PipelineError if the Supervisor has none.
        """
        for _ in range(_AGREE_TRIES):
            try:
                record: ModelRecord = await self._supervisor.record.remote()
                return record
            except RayError as e:
                if isinstance(getattr(e, "cause", None), LlmdError):
                    raise PipelineError(str(e.cause)) from e
                await asyncio.sleep(_RENEW_S)  # it is being restarted, or has just ended: `_renew` makes another
        raise PipelineError("the supervisor does not answer")

    async def _locate(self, replica: int) -> LinkAddress:
        try:
            address: LinkAddress = await self._supervisor.head_address.remote(replica)
            beside_us = address.host == get_node_ip_address()
            return replace(address, host=LOOPBACK) if beside_us else address
        except RayError as e:
            cause = getattr(e, "cause", None)
            if isinstance(cause, ReplacedError):
                raise ReplacedError(str(cause)) from e
            raise PipelineError(str(cause or "the supervisor does not answer").splitlines()[0]) from e

    async def _renew(self) -> None:
        process: Place | None = None
        while True:
            try:
                async with asyncio.timeout(_HANGS_S):
                    asked = self._name, self._began, self._record, self._replicas
                    process = await self._supervisor.lease.remote(*asked)
            except TimeoutError:
                if process is not None:  # while it hangs nobody replaces what dies; Ray restarts it
                    await kill_processes([process])
            except RayError:
                _log.warning("the supervisor does not answer; making sure there is one")
                self._supervisor = supervisor_of(self._args, self._version)
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
