"""The Supervisor: makes the pipeline, watches it, replaces what dies, removes it when nobody needs it.

Every part tells it of neighbours that it lost, within a second; what answers no ping hangs. What is dead is replaced
alone. Where that does not come to its end, the pipeline is built anew.
A detached, restartable actor that owns nothing whose death would take children along: pipelines are detached
placement groups and actors with names, which a restarted Supervisor finds again. Ingresses hold leases; when the
last one lapses, everything is removed and the Supervisor ends, so that `serve shutdown` leaves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.cluster.actors import kill_processes, known_groups, names_of, tear_down
from serve_app.cluster.audit_watch import AuditWatch
from serve_app.cluster.pipeline_group import (
    BrokenError,
    PipelineGroup,
    adopt_group,
    build_group,
    digest_of,
    repair_group,
    replenish,
)
from serve_app.cluster.specs import NAMESPACE, SUPERVISOR, Trouble
from serve_app.cluster.wiring import HEAD
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
_NAMED_S = 1.0  # the same for one that its neighbours have lost: what lives in spite of that answers
_REPAIRS = 3  # in a row; each may find further parts dead
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
        self._repairs = 0
        self._polls: list[asyncio.Future[Trouble]] = []  # what each part will say when it is in trouble
        self._audits = AuditWatch()
        self._main: asyncio.Task[None] | None = None

    async def lease(self, ingress: str, args: dict[str, Any], began: float) -> None:
        """An ingress is alive and serves this configuration; a changed one replaces the pipeline.

        began: when the ingress was made, Unix time. While Serve replaces its replicas, old and new ones
        hold leases side by side: the youngest decides.
        """
        self._leases[ingress] = time.monotonic()
        if args != self._args and began > self._args_began:
            self._args_began = began
            self._args, self._config = args, AppConfig.parse(args)  # whether it makes a difference, the next check sees
        if self._main is None:
            self._main = asyncio.get_running_loop().create_task(self._supervise())

    async def release(self, ingress: str) -> None:
        """An ingress ends in good order."""
        self._leases.pop(ingress, None)
        self._born = float("-inf")  # whoever released has been here: no waiting for a first one

    async def head_address(self) -> LinkAddress:
        """Where the pipeline's Head listens. Raises PipelineError while there is none."""
        if self._group is None or self._group.head is None or self._group.address is None:
            raise PipelineError(self._problem)
        return self._group.address

    async def status(self) -> dict[str, Value]:
        """What is there, for tests and people."""
        group = self._group
        return {
            "epoch": group.epoch if group else 0,
            "problem": None if group else self._problem,
            "ingresses": len(self._leases),
            "rebuilds": max(0, self._rebuilds),
            "repairs": self._repairs,
            "spares": len(group.spares) if group else 0,
        }

    async def _supervise(self) -> None:
        await self._adopt()
        while self._wanted():
            try:
                if self._group is None:
                    await self._build()
                else:
                    await self._check(self._group)
            except Exception as e:  # whatever it was: nobody would miss a watch that had ended
                _log.exception("the pipeline cannot be watched")
                await self._lose(f"{type(e).__name__}: {e}")
                await asyncio.sleep(_REBUILD_PAUSE_S)
            if self._polls:  # sooner if a part is in trouble
                await asyncio.wait(self._polls, timeout=_WATCH_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(_WATCH_EVERY_S)
        _log.info("nobody serves the pipeline any more")
        self._audits.stop()
        for group in known_groups():
            tear_down(group)
        # Not exit_actor: it ends an actor by an exception, which a background task cannot raise to Ray.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _adopt(self) -> None:
        """The pipeline of a Supervisor before this one goes on; what is none, or another one, goes."""
        for group in sorted(known_groups(), reverse=True):
            found = None if self._group is not None else await adopt_group(self._config, group, names_of(group))
            if found is None:
                tear_down(group)
            else:
                self._group = found
                self._poll(found)

    async def _build(self) -> None:
        number = max({int(time.time())} | {g + 1 for g in known_groups()})
        try:
            group = await build_group(self._config, number)
            self._group = group
            self._rebuilds += 1
            self._poll(group)
            await self._check(group)  # its first word about its stages, for status calls
            _log.info("pipeline %d is ready: %d stages", number, len(group.stages))
        except (LlmdError, RayError, TimeoutError) as e:
            self._problem = f"the pipeline cannot start: {e or type(e).__name__}"
            _log.error("%s", self._problem)
            await asyncio.sleep(_REBUILD_PAUSE_S)

    def _poll(self, group: PipelineGroup) -> None:
        """Have every part tell of trouble in this epoch."""
        for poll in self._polls:
            poll.cancel()
        actors = [actor for actor, _ in group.parts().values() if actor is not None]
        self._polls = [asyncio.ensure_future(actor.trouble.remote(group.epoch)) for actor in actors]

    async def _check(self, group: PipelineGroup) -> None:
        """Replace what is dead, if something is."""
        if group.spec.config_digest != digest_of(self._config):
            await self._lose("the configuration changed")
            return
        # What hangs keeps its answer waiting for seconds, and its neighbours may know sooner.
        asking = asyncio.ensure_future(self._dead(group, frozenset()))
        waited: set[asyncio.Future[Any]] = {asking, *self._polls}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        ended = [poll for poll in self._polls if poll.done()]
        said = [poll.result() for poll in ended if poll.exception() is None]
        fatal = next((trouble for trouble in said if trouble.fatal), None)
        if fatal is not None:
            asking.cancel()
            await self._lose(fatal.why)
            return
        named = frozenset().union(*(trouble.gone for trouble in said))
        if ended:
            asking.cancel()
            asking = asyncio.ensure_future(self._dead(group, named))
        dead, stages = await asking
        if dead or ended:
            why = "; ".join(trouble.why for trouble in said) or f"no answer from {', '.join(sorted(dead))}"
            await self._repair(group, dead, why)
            return
        assert group.head is not None
        group.head.ping.remote(stages, self._audits.state(group))  # whether it answers, the next check sees
        self._audits.tick(self._config, group)
        left, quarantined = self._audits.to_replace(group)
        if quarantined:
            await self._repair(left, quarantined, f"{', '.join(sorted(quarantined))} of quarantined nodes")
            return
        group = replace(group, spares=await self._living(group.spares))
        if sum(spare is not None for spare in group.spares) < self._config.pipeline.spares:
            self._group = await replenish(self._config, group)

    async def _living(self, spares: Sequence[Any]) -> tuple[Any | None, ...]:
        """None in place of those that died while they waited."""

        async def ask(spare: Any) -> Any | None:
            try:
                async with asyncio.timeout(_NAMED_S):
                    await spare.ready.remote()
            except RayError:
                return None
            except TimeoutError:
                pass  # it loads
            return spare

        return tuple(await asyncio.gather(*(ask(spare) for spare in spares)))

    async def _dead(self, group: PipelineGroup, named: frozenset[str]) -> tuple[frozenset[str], list[Value]]:
        """Parts that do not live, and what the stages said of themselves."""

        async def ask(name: str, actor: Any) -> Value | BaseException:
            try:
                async with asyncio.timeout(_NAMED_S if name in named else _PING_S):
                    answer: Value = await (actor.party.remote() if name == HEAD else actor.ping.remote())
                    return answer
            except (RayError, TimeoutError) as e:
                return e

        parts = group.parts()
        here = {name: actor for name, (actor, _) in parts.items() if actor is not None}
        found = await asyncio.gather(*(ask(name, actor) for name, actor in here.items()))
        answers = {name: said for name, said in zip(here, found, strict=True) if not isinstance(said, BaseException)}
        return frozenset(parts) - answers.keys(), [said for name, said in answers.items() if name != HEAD]

    async def _repair(self, group: PipelineGroup, dead: frozenset[str], why: str) -> None:
        """Replace these parts, and those that turn out to be dead meanwhile."""
        _log.error("pipeline %d: %s", group.group, why)
        began = time.monotonic()
        self._problem = f"a part is being replaced: {why}"
        for _ in range(_REPAIRS):
            if HEAD in dead:  # an ingress asks for it from now on
                self._group = group = replace(group, head=None, address=None)
            try:
                self._group = group = await repair_group(self._config, group, dead)
            except BrokenError as e:
                _log.error("pipeline %d: a repair was cut short: %s", group.group, e)
                group, why = e.group, str(e)
                dead = e.dead | (await self._dead(group, frozenset()))[0]
                continue
            self._repairs += 1
            self._poll(group)
            _log.warning("pipeline %d is whole again after %.1f s", group.group, time.monotonic() - began)
            return
        self._group = group
        await self._lose(why)

    async def _lose(self, why: str) -> None:
        """Give the pipeline up: its requests end with an error, its actors and resources are freed."""
        group, self._group = self._group, None
        self._problem = f"the pipeline is being rebuilt: {why}"
        for poll in self._polls:
            poll.cancel()
        self._polls = []
        if group is None:
            return
        _log.error("pipeline %d is given up: %s", group.group, why)
        try:
            if group.head is not None:
                async with asyncio.timeout(1.0):
                    await group.head.fail.remote(why)
        except (RayError, TimeoutError):
            pass  # a dead Head's connections end by themselves
        tear_down(group.group)
        await kill_processes([place for _, place in group.parts().values()])

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
