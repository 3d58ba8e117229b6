"""The Supervisor: makes the pipeline, watches it, rebuilds it when a part dies, removes it when nobody needs it.

A detached, restartable actor that owns nothing whose death would take children along: pipelines are detached
placement groups and actors with names, which a restarted Supervisor finds again. Ingresses hold leases; when the
last one lapses, everything is removed and the Supervisor ends, so that `serve shutdown` leaves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.cluster.pipeline_group import PipelineGroup, adopt_group, build_group, digest_of, known_epochs, tear_down
from serve_app.cluster.specs import NAMESPACE, SUPERVISOR
from serve_app.config import AppConfig
from serve_app.errors import PipelineError
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)

# An ingress renews every second, and gives its lease back when it is shut down. One that is killed does not: Serve puts
# another in its place within 13 s on two cores, for which the pipeline must wait and not be loaded anew.
LEASE_S = 30.0
_FIRST_LEASE_S = 60.0  # after the start: an ingress that never came will not come
_WATCH_EVERY_S = 1.0
_PING_S = 5.0  # a part that does not answer for so long hangs; a loaded two-core machine answers in 1 s
_REBUILD_PAUSE_S = 2.0  # after a build that failed: the same fault would fail it again at once


class _SupervisorProcess:
    """One per cluster, named SUPERVISOR in NAMESPACE."""

    def __init__(self, args: dict[str, Any]) -> None:
        """args: of our Serve application, as AppConfig.parse takes them."""
        self._args = args
        self._config = AppConfig.parse(args)
        self._args_began = 0.0
        self._leases: dict[str, float] = {}
        self._born = time.monotonic()
        self._group: PipelineGroup | None = None
        self._problem = "the pipeline is starting"
        self._rebuilds = -1
        self._main: asyncio.Task[None] | None = None

    async def lease(self, ingress: str, args: dict[str, Any], began: float) -> None:
        """An ingress is alive and serves this configuration; a changed one replaces the pipeline.

        began: when the ingress was made, Unix time. While Serve replaces its replicas, old and new ones
        hold leases side by side: the youngest decides.
        """
        self._leases[ingress] = time.monotonic()
        if args != self._args and began > self._args_began:
            self._args_began = began
            before, self._args, self._config = self._config, args, AppConfig.parse(args)
            if digest_of(before) != digest_of(self._config):
                await self._lose("the configuration changed")
        if self._main is None:
            self._main = asyncio.get_running_loop().create_task(self._supervise())

    async def release(self, ingress: str) -> None:
        """An ingress ends in good order."""
        self._leases.pop(ingress, None)
        self._born = float("-inf")  # whoever released has been here: no waiting for a first one

    async def head_address(self) -> LinkAddress:
        """Where the pipeline's Head listens. Raises PipelineError while there is none."""
        if self._group is None:
            raise PipelineError(self._problem)
        return self._group.address

    async def status(self) -> dict[str, Value]:
        """What is there, for tests and people."""
        return {
            "epoch": self._group.epoch if self._group else 0,
            "problem": None if self._group else self._problem,
            "ingresses": len(self._leases),
            "rebuilds": max(0, self._rebuilds),
        }

    async def _supervise(self) -> None:
        for epoch in sorted(known_epochs(), reverse=True):  # of a Supervisor before this one
            self._group = self._group or await adopt_group(self._config, epoch)
            if self._group is None or self._group.epoch != epoch:
                tear_down(epoch)
        while self._wanted():
            if self._group is None:
                await self._build()
            else:
                await self._check(self._group)
            await asyncio.sleep(_WATCH_EVERY_S)
        _log.info("nobody serves the pipeline any more")
        for epoch in known_epochs():
            tear_down(epoch)
        # Not exit_actor: it ends an actor by an exception, which a background task cannot raise to Ray.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _build(self) -> None:
        epoch = max({int(time.time())} | {e + 1 for e in known_epochs()})
        try:
            group = await build_group(self._config, epoch)
            self._group = group
            self._rebuilds += 1
            await self._check(group)  # its first word about its stages, for status calls
            _log.info("pipeline %d is ready: %d stages", epoch, len(group.stages))
        except (LlmdError, RayError, TimeoutError) as e:
            self._problem = f"the pipeline cannot start: {e or type(e).__name__}"
            _log.error("%s", self._problem)
            await asyncio.sleep(_REBUILD_PAUSE_S)

    async def _check(self, group: PipelineGroup) -> None:
        """Ask every part whether it lives; one that does not answer costs the whole pipeline, for now."""
        try:
            async with asyncio.timeout(_PING_S):
                stages: list[Value] = await asyncio.gather(*(stage.ping.remote() for stage in group.stages))
        except (RayError, TimeoutError) as e:
            await self._lose(f"a stage died or hangs ({type(e).__name__})")
            return
        try:
            async with asyncio.timeout(_PING_S):
                failure: str | None = await group.head.ping.remote(stages)
        except (RayError, TimeoutError) as e:
            await self._lose(f"the head died or hangs ({type(e).__name__})")
            return
        if failure is not None and self._group is group:
            await self._lose(failure)

    async def _lose(self, why: str) -> None:
        """Give the pipeline up: its requests end with an error, its actors and resources are freed."""
        group, self._group = self._group, None
        self._problem = f"the pipeline is being rebuilt: {why}"
        if group is None:
            return
        _log.error("pipeline %d is given up: %s", group.epoch, why)
        try:
            async with asyncio.timeout(1.0):
                await group.head.fail.remote(why)
        except (RayError, TimeoutError):
            pass  # a dead Head's connections end by themselves
        tear_down(group.epoch)

    def _wanted(self) -> bool:
        now = time.monotonic()
        self._leases = {i: t for i, t in self._leases.items() if now - t < LEASE_S}
        return bool(self._leases) or now - self._born < _FIRST_LEASE_S


SupervisorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(_SupervisorProcess)


def supervisor_of(args: dict[str, Any]) -> Any:
    """The cluster's Supervisor, made with this configuration if there is none."""
    return SupervisorActor.options(
        name=SUPERVISOR, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(args)
