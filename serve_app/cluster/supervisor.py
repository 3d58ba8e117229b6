"""The Supervisor: makes the pipeline, watches it, replaces what dies, removes it when nobody needs it.

Every part tells it of neighbours that it lost, within a second; what answers no ping hangs. What is dead is replaced
alone. Where that does not come to its end, the pipeline is built anew.
A detached, restartable actor that owns nothing whose death would take children along: pipelines are detached
placement groups and actors with names, which a restarted Supervisor finds again. Ingresses hold leases; when the
last one lapses, everything is removed and the Supervisor ends, so that `serve shutdown` leaves nothing.
Each version of the application (version.py) has one. While Serve replaces one version by the next, both are there. If
there is no room for that, the older one ends first: it takes nothing new, and lets what runs come to its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.cluster.actors import kill_processes, known_groups, names_of, other_groups, supervisors, tear_down
from serve_app.cluster.audit_watch import AuditWatch
from serve_app.cluster.pipeline_group import (
    BrokenError,
    PipelineGroup,
    adopt_group,
    build_group,
)
from serve_app.cluster.repair import repair_group, replenish
from serve_app.cluster.resources import fewer_stages, fits
from serve_app.cluster.specs import NAMESPACE, GroupId, Place, Trouble, supervisor_name
from serve_app.cluster.stage_handle import RayStage
from serve_app.cluster.version import find_record
from serve_app.cluster.wiring import HEAD
from serve_app.config import AppConfig
from serve_app.errors import NoRoomError, PipelineError, ReplacedError
from serve_app.pipeline.progress import hanging
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError
from shard_tools.index.model_index import ModelRecord

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
_TOLD_S = 3.0  # after a restart: an ingress that knows what is served says so with its next lease, every second
_PLAN_AGAIN_S = 30.0  # between two looks whether a pipeline with fewer stages than it is to have may have them again
_YIELD_S = 5.0  # for another version's Supervisor to hear that it is to make room


class _SupervisorProcess:
    """One per cluster and version, named so in NAMESPACE."""

    def __init__(self, args: dict[str, Any], version: str) -> None:
        """args: of our Serve application, as AppConfig.parse takes them. version: as version_of."""
        self._config, self._version = AppConfig.parse(args), version
        self._record: ModelRecord | None = None  # of the model; kept, whatever its name leads to later
        self._adopted = asyncio.Event()
        self._began = 0.0  # of the youngest ingress, Unix time: which version is to be there, says the youngest
        self._yields_to: float | None = None  # when an ingress of another version began, for which this one makes room
        self._yields_s = 0.0  # since when
        self._drains = False  # the Head refuses what is new
        self._planned_s = 0.0  # when it was last looked for how many stages there is room
        self._leases: dict[str, float] = {}
        self._born = time.monotonic()
        self._group: PipelineGroup | None = None
        self._problem = "the pipeline is starting"
        self._rebuilds = -1
        self._repairs = 0
        self._polls: list[asyncio.Future[Trouble]] = []  # what each part will say when it is in trouble
        self._audits = AuditWatch()
        self._main: asyncio.Task[None] | None = None

    async def lease(self, ingress: str, began: float, record: ModelRecord | None) -> Place:
        """An ingress of this version is alive. Returns which process this is, to be killed should it hang.

        began: when it was made, Unix time. record: of the model that it serves, if it knows already.
        """
        self._leases[ingress] = time.monotonic()
        self._record = self._record or record
        self._began = max(self._began, began)
        if self._yields_to is not None and began > self._yields_to:
            self._yields_to = None  # this version has been rolled out again
        self._begin()
        return Place("", -1, os.getpid(), ray.get_runtime_context().get_node_id())

    async def record(self) -> ModelRecord:
        """The model that this version serves, from its first answer on. Raises LlmdError if it cannot be had."""
        self._begin()
        await self._adopted.wait()
        if self._record is None:
            found = await asyncio.get_running_loop().run_in_executor(None, find_record, self._config)
            self._record = self._record or found
        return self._record

    async def make_way(self, began: float) -> None:
        """A version whose youngest ingress began then finds no room: if it is the younger one, end first."""
        if began > self._began and self._yields_to is None:
            _log.warning("version %s makes room for a newer one", self._version)
            self._yields_to, self._yields_s = began, time.monotonic()

    def _begin(self) -> None:
        if self._main is None:
            self._main = asyncio.get_running_loop().create_task(self._supervise())

    async def release(self, ingress: str) -> None:
        """An ingress ends in good order."""
        self._leases.pop(ingress, None)
        self._born = float("-inf")  # whoever released has been here: no waiting for a first one

    async def head_address(self) -> LinkAddress:
        """Where the pipeline's Head listens. Raises PipelineError while there is none."""
        if self._group is None and self._yields_to is not None:
            raise ReplacedError("a newer version of the application has taken this one's place")
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
        try:
            await self._adopt()
        except Exception:  # then all is made anew
            _log.exception("what was there before cannot be gone on with")
        self._adopted.set()
        while self._wanted():
            try:
                if self._group is not None and self._yields_to is not None and await self._drained(self._group):
                    await self._lose("a newer version of the application takes its place")
                elif self._group is not None:
                    await self._check(self._group)
                elif self._yields_to is None:
                    await self._build()
            except Exception as e:  # whatever it was: nobody would miss a watch that had ended
                _log.exception("the pipeline cannot be watched")
                await self._lose(f"{type(e).__name__}: {e}")
                await asyncio.sleep(_REBUILD_PAUSE_S)
            if self._polls:  # sooner if a part is in trouble
                await asyncio.wait(self._polls, timeout=_WATCH_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(_WATCH_EVERY_S)
        _log.info("nobody serves version %s any more", self._version)
        await self._audits.stop()
        for group in known_groups(self._version):
            tear_down(group)
        # Not exit_actor: it ends an actor by an exception, which a background task cannot raise to Ray.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _adopt(self) -> None:
        """The pipeline of a Supervisor before this one goes on; what is none goes."""
        for group in sorted(known_groups(self._version), reverse=True):
            found = None if self._group is not None else await adopt_group(self._config, names_of(group))
            if found is None:
                tear_down(group)
            else:
                self._group = found
                stage = found.spec.plan.stages[0]
                self._record = ModelRecord(stage.manifest, stage.signature)
                self._poll(found)
        until = time.monotonic() + _TOLD_S
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        while restarted and self._record is None and time.monotonic() < until:
            await asyncio.sleep(0.1)

    async def _build(self) -> None:
        number = max({int(time.time())} | {g.number + 1 for g in known_groups(self._version)})
        try:
            if self._config.pipeline.outside:  # a stage of another operator is part of one pipeline at a time
                await self._wait_until_alone()
            group = await self._with_room(number, await self.record())
            self._group = group
            self._rebuilds += 1
            self._poll(group)
            await self._check(group)  # its first word about its stages, for status calls
            _log.info("%s is ready: %d stages", group.group, len(group.stages))
        except (LlmdError, RayError, TimeoutError) as e:
            self._problem = f"the pipeline cannot start: {e or type(e).__name__}"
            _log.error("%s", self._problem)
            await asyncio.sleep(_REBUILD_PAUSE_S)

    async def _with_room(self, number: int, record: ModelRecord) -> PipelineGroup:
        """A pipeline of as many stages as there is room for. Raises LlmdError, RayError, TimeoutError."""
        for config in fewer_stages(self._config):
            self._planned_s = time.monotonic()
            try:
                return await build_group(config, GroupId(self._version, number), record, self._ask_for_room)
            except NoRoomError as e:
                no_room = e
                _log.error("%s", e)
            number += 1
        raise no_room

    async def _ask_for_room(self) -> bool:
        """Older versions end first. Whether there are any, or nothing else is to be done than to wait."""
        others = [actor for name, actor in supervisors().items() if name != supervisor_name(self._version)]
        asked = [asyncio.ensure_future(other.make_way.remote(self._began)) for other in others]
        if asked:
            await asyncio.wait(asked, timeout=_YIELD_S)  # one that does not answer yields nothing: no room, says Ray
        return bool(asked) or self._config.pipeline.stages_at_least is None

    async def _spreads_again(self, group: PipelineGroup) -> bool:
        """It has fewer stages than it is to have, and the cluster seems to have grown; asked now and then."""
        if len(group.stages) >= self._config.pipeline.stages or time.monotonic() - self._planned_s < _PLAN_AGAIN_S:
            return False
        self._planned_s = time.monotonic()
        return fits(self._config)

    async def _wait_until_alone(self) -> None:
        """No other version has a pipeline any more, or they have had their time."""
        until = time.monotonic() + self._config.ingress.drain_s + _YIELD_S
        while other_groups(self._version) and time.monotonic() < until:
            await self._ask_for_room()
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _drained(self, group: PipelineGroup) -> bool:
        """Whether nothing runs any more, or has had its time. The Head takes nothing new from now on."""
        if time.monotonic() - self._yields_s > self._config.ingress.drain_s or group.head is None:
            return True
        self._drains = True
        try:
            async with asyncio.timeout(_PING_S):
                left: int = await group.head.drain.remote(True)
                return left == 0
        except (RayError, TimeoutError):
            return False  # what it has died of, the next check sees

    def _poll(self, group: PipelineGroup) -> None:
        """Have every part tell of trouble in this epoch."""
        for poll in self._polls:
            poll.cancel()
        polls = [stage.trouble(group.epoch) for stage in group.stages if stage is not None]
        heads = [] if group.head is None else [group.head.trouble.remote(group.epoch)]
        self._polls = [asyncio.ensure_future(poll) for poll in (*polls, *heads)]

    async def _check(self, group: PipelineGroup) -> None:
        """Replace what is dead, if something is."""
        # What hangs keeps its answer waiting for seconds, and its neighbours may know sooner.
        asking = asyncio.ensure_future(self._dead(group, frozenset()))
        waited: set[asyncio.Future[Any]] = {asking, *self._polls}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        ended = [poll for poll in self._polls if poll.done()]
        said = [poll.result() for poll in ended if not poll.cancelled() and poll.exception() is None]
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
        if not dead and (hung := hanging(stages)) is not None:  # it answers, but what it computes does not come
            await self._repair(group, frozenset({f"stage {hung[0]}"}), hung[1])
            return
        if not (dead or ended) and await self._spreads_again(group):
            await self._lose("there is room for all stages again")
            return
        if dead or ended:
            why = "; ".join(trouble.why for trouble in said) or f"no answer from {', '.join(sorted(dead))}"
            await self._repair(group, dead, why)
            return
        assert group.head is not None
        if self._drains and self._yields_to is None:
            group.head.drain.remote(False)
            self._drains = False
        group.head.ping.remote(stages, self._audits.state(group))  # whether it answers, the next check sees
        self._audits.tick(self._config, group)
        left, quarantined = self._audits.to_replace(group)
        if quarantined:
            await self._repair(left, quarantined, f"{', '.join(sorted(quarantined))} of quarantined nodes")
            return
        group = replace(group, spares=await self._living(group.spares))
        if sum(spare is not None for spare in group.spares) < self._config.pipeline.spares:
            self._group = await replenish(self._config, group)

    async def _living(self, spares: Sequence[RayStage | None]) -> tuple[RayStage | None, ...]:
        """None in place of those that died while they waited."""

        async def ask(spare: RayStage | None) -> RayStage | None:
            if spare is None:
                return None
            try:
                async with asyncio.timeout(_NAMED_S):
                    await spare.ready()
            except RayError:
                return None
            except TimeoutError:
                pass  # it loads
            return spare

        return tuple(await asyncio.gather(*(ask(spare) for spare in spares)))

    async def _dead(self, group: PipelineGroup, named: frozenset[str]) -> tuple[frozenset[str], list[Value]]:
        """Parts that do not live, and what the stages said of themselves."""

        async def ask(name: str, word: Callable[[], Awaitable[Value]]) -> Value | BaseException:
            try:
                async with asyncio.timeout(_NAMED_S if name in named else _PING_S):
                    return await word()
            except (RayError, LlmdError, TimeoutError) as e:
                return e

        words: dict[str, Callable[[], Awaitable[Value]]] = {
            f"stage {i}": stage.ping for i, stage in enumerate(group.stages) if stage is not None
        }
        if group.head is not None:
            words[HEAD] = group.head.party.remote
        found = await asyncio.gather(*(ask(name, word) for name, word in words.items()))
        answers = {name: said for name, said in zip(words, found, strict=True) if not isinstance(said, BaseException)}
        return frozenset(group.places()) - answers.keys(), [said for name, said in answers.items() if name != HEAD]

    async def _repair(self, group: PipelineGroup, dead: frozenset[str], why: str) -> None:
        """Replace these parts, and those that turn out to be dead meanwhile."""
        _log.error("%s: %s", group.group, why)
        began = time.monotonic()
        self._problem = f"a part is being replaced: {why}"
        for _ in range(_REPAIRS):
            if HEAD in dead:  # an ingress asks for it from now on
                self._group = group = replace(group, head=None, address=None)
            try:
                self._group = group = await repair_group(self._config, group, dead)
            except BrokenError as e:
                _log.error("%s: a repair was cut short: %s", group.group, e)
                group, why = e.group, str(e)
                if isinstance(e.__cause__, TimeoutError | NoRoomError):
                    break  # somebody answers pings and does nothing else, and nobody knows who; or there is no place
                dead = e.dead | (await self._dead(group, frozenset()))[0]
                continue
            self._repairs += 1
            self._poll(group)
            _log.warning("%s is whole again after %.1f s", group.group, time.monotonic() - began)
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
        _log.error("%s is given up: %s", group.group, why)
        try:
            if group.head is not None:
                async with asyncio.timeout(1.0):
                    await group.head.fail.remote(why)
        except (RayError, TimeoutError):
            pass  # a dead Head's connections end by themselves
        try:
            tear_down(group.group)
        except (RayError, ValueError) as e:
            _log.error("what is left of %s: %s", group.group, e)  # `_adopt` and the end look for it again
        await kill_processes([*group.places().values()])

    def _wanted(self) -> bool:
        now = time.monotonic()
        self._leases = {i: t for i, t in self._leases.items() if now - t < LEASE_S}
        return bool(self._leases) or now - self._born < _FIRST_LEASE_S


SupervisorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(_SupervisorProcess)


def supervisor_of(args: dict[str, Any], version: str) -> Any:
    """The cluster's Supervisor of this version, made with this configuration if there is none."""
    return SupervisorActor.options(
        name=supervisor_name(version), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(args, version)
