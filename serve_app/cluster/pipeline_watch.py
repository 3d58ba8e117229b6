"""One of a version's pipelines, as the Supervisor keeps it: made, watched, mended, made anew, and let go in good order.

Every part tells of neighbours that it lost, within a second; what answers no ping hangs. What is dead is replaced
alone. Where that does not come to its end, the pipeline is built anew; where it has no room, it goes on asking for it.
Knows nothing of the others, which serve meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ray.exceptions import RayError

from serve_app.cluster.actors import kill_processes, known_groups, other_groups, tear_down
from serve_app.cluster.audit_watch import AuditWatch
from serve_app.cluster.pipeline_group import BrokenError, PipelineGroup, build_group
from serve_app.cluster.repair import repair_group, replenish
from serve_app.cluster.resources import fewer_stages, fits
from serve_app.cluster.specs import GroupId, GroupPlan, Trouble
from serve_app.cluster.stage_handle import RayStage
from serve_app.cluster.wiring import HEAD
from serve_app.config import AppConfig
from serve_app.errors import NoRoomError, PipelineError, ReplacedError
from serve_app.pipeline.pace import Crawling
from serve_app.pipeline.progress import hanging
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError
from shard_tools.index.model_index import ModelRecord

_log = logging.getLogger(__name__)
_WATCH_EVERY_S = 1.0
_PING_S = 5.0  # a part that does not answer for so long hangs; a loaded two-core machine answers in 1 s
_NAMED_S = 1.0  # the same for one that its neighbours have lost: what lives in spite of that answers
_REPAIRS = 3  # in a row; each may find further parts dead
_REBUILD_PAUSE_S = 2.0  # after a build that failed: the same fault would fail it again at once
_PLAN_AGAIN_S = 30.0  # between two looks whether a pipeline with fewer stages than it is to have may have them again
_ALONE_S = 5.0  # beyond the time to drain, for other versions to be gone


class Version(Protocol):
    """What a watch must know of the version of the application that its pipeline is of."""

    @property
    def name(self) -> str:
        """As version.version_of."""
        ...

    @property
    def config(self) -> AppConfig:
        """As of now: how many pipelines there are to be changes."""
        ...

    @property
    def audits(self) -> AuditWatch: ...

    async def record(self) -> ModelRecord:
        """The model. Raises LlmdError if it cannot be had."""
        ...

    async def ask_for_room(self, replica: int) -> bool:
        """Older versions end first. Whether there are any, or nothing else is to be done than to wait."""
        ...

    def beside(self, replica: int) -> list[GroupPlan]:
        """The other pipelines of this version that are there."""
        ...


class PipelineWatch:
    """Of one pipeline, in one event loop with its version."""

    def __init__(self, replica: int, version: Version, found: PipelineGroup | None = None) -> None:
        """found: what there is of it already."""
        self.replica, self.group = replica, found
        self._version = version
        self._problem = "the pipeline is starting"
        self._retires: tuple[str, float] | None = None  # why it takes nothing new and is not made anew, and since when
        self._drains = False  # the Head refuses what is new
        self._planned_s = 0.0  # when it was last looked for how many stages there is room
        self._rebuilds = -1 if found is None else 0
        self._repairs = 0
        self._crawling = Crawling()
        self._polls: list[asyncio.Future[Trouble]] = []  # what each part will say when it is in trouble
        self._building: asyncio.Task[None] | None = None
        self._main: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Make and watch it, in the background of the running loop."""
        if self.group is not None:
            self._poll(self.group)
        self._main = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """It is watched no longer, nor made; what is there of it stays."""
        tasks = [task for task in (self._building, self._main) if task is not None]
        for poll in self._polls:
            poll.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def retire(self, why: str, *, at_once: bool) -> None:
        """It takes nothing new, lets what runs come to its end, and ends.

        at_once: what is being made of it is not waited for; else requests that wait for it come to their end first.
        """
        if self._retires is None:
            _log.warning("pipeline %d ends: %s", self.replica, why)
            self._retires = why, time.monotonic()
        if at_once and self._building is not None:
            self._building.cancel()

    def stay(self) -> None:
        """It is to be there after all."""
        self._retires = None

    @property
    def was_there(self) -> bool:
        """Whether it has ever served."""
        return self._rebuilds >= 0

    @property
    def retires(self) -> bool:
        """Whether it is to end, or has."""
        return self._retires is not None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._retires is not None and self.group is None and self._building is None

    def address(self) -> LinkAddress:
        """Where its Head listens. Raises PipelineError while there is none, ReplacedError if there will be none."""
        if self.group is None and self._retires is not None:
            raise ReplacedError(self._retires[0])
        if self.group is None or self.group.head is None or self.group.address is None:
            raise PipelineError(self._problem)
        return self.group.address

    def status(self) -> dict[str, Value]:
        """What is there, for tests and people."""
        group = self.group
        return {
            "replica": self.replica,
            "epoch": group.epoch if group else 0,
            "problem": None if group else self._problem,
            "rebuilds": max(0, self._rebuilds),
            "repairs": self._repairs,
            "spares": len(group.spares) if group else 0,
        }

    async def _watch(self) -> None:
        while True:
            try:
                if self.group is not None and self._retires is not None and await self._drained(self.group):
                    await self._lose(self._retires[0])
                elif self.group is not None:
                    await self._check(self.group)
                elif self._retires is None:
                    await self._build_unless_retired()
            except Exception as e:  # whatever it was: nobody would miss a watch that had ended
                _log.exception("pipeline %d cannot be watched", self.replica)
                await self._lose(f"{type(e).__name__}: {e}")
                await asyncio.sleep(_REBUILD_PAUSE_S)
            if self._polls:  # sooner if a part is in trouble
                await asyncio.wait(self._polls, timeout=_WATCH_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(_WATCH_EVERY_S)

    async def _build_unless_retired(self) -> None:
        building = self._building = asyncio.get_running_loop().create_task(self._build())
        try:
            await asyncio.wait({building})
        finally:
            self._building = None
        if not building.cancelled():
            building.result()

    async def _build(self) -> None:
        try:
            if self._version.config.pipeline.outside:  # a stage of another operator is part of one pipeline at a time
                await self._wait_until_alone()
            group = await self._with_room(await self._version.record())
            self.group = group
            self._rebuilds += 1
            self._poll(group)
            await self._check(group)  # its first word about its stages, for status calls
            _log.info("%s is ready: %d stages", group.group, len(group.stages))
        except (LlmdError, RayError, TimeoutError) as e:
            self._problem = f"the pipeline cannot start: {e or type(e).__name__}"
            _log.error("%s", self._problem)
            await asyncio.sleep(_REBUILD_PAUSE_S)

    async def _with_room(self, record: ModelRecord) -> PipelineGroup:
        """A pipeline of as many stages as there is room for. Raises LlmdError, RayError, TimeoutError."""
        name = self._version.name
        number = max({int(time.time())} | {g.number + 1 for g in known_groups(name) if g.replica == self.replica})
        for config in fewer_stages(self._version.config):
            self._planned_s = time.monotonic()
            try:
                return await build_group(config, GroupId(name, self.replica, number), record, self._ask_for_room)
            except NoRoomError as e:
                no_room = e
                _log.error("%s", e)
                self._problem = f"the pipeline cannot start: {e}"
            number += 1
        raise no_room

    async def _ask_for_room(self) -> bool:
        return await self._version.ask_for_room(self.replica)

    async def _spreads_again(self, group: PipelineGroup) -> bool:
        """It has fewer stages than it is to have, and the cluster seems to have grown; asked now and then."""
        config = self._version.config
        if len(group.stages) >= config.pipeline.stages or time.monotonic() - self._planned_s < _PLAN_AGAIN_S:
            return False
        self._planned_s = time.monotonic()
        return fits(config, self._version.beside(self.replica))

    async def _wait_until_alone(self) -> None:
        """No other version has a pipeline any more, or they have had their time."""
        until = time.monotonic() + self._version.config.ingress.drain_s + _ALONE_S
        while other_groups(self._version.name) and time.monotonic() < until:
            await self._ask_for_room()
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _drained(self, group: PipelineGroup) -> bool:
        """Whether nothing runs any more, or has had its time. The Head takes nothing new from now on."""
        assert self._retires is not None
        if time.monotonic() - self._retires[1] > self._version.config.ingress.drain_s or group.head is None:
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
        if self._drains and self._retires is None:
            group.head.drain.remote(False)
            self._drains = False
        for news in self._crawling.look(stages, group.epoch):
            _log.warning("%s: %s", group.group, news)
        group.head.ping.remote(stages, self._version.audits.state(group))  # whether it answers, the next check sees
        left, quarantined = self._version.audits.to_replace(group)
        if quarantined:
            await self._repair(left, quarantined, f"{', '.join(sorted(quarantined))} of quarantined nodes")
            return
        group = replace(group, spares=await self._living(group.spares))
        if (crawls := self._to_replace(group)) is not None:
            await self._repair(group, frozenset({f"stage {crawls[0]}"}), crawls[1])
            return
        if sum(spare is not None for spare in group.spares) < self._version.config.pipeline.spares:
            self.group = await replenish(self._version.config, group)

    def _to_replace(self, group: PipelineGroup) -> tuple[int, str] | None:
        """The stage that crawls and gives its place to a spare, and why; a new process would find what slowed it."""
        asked = self._version.config.pipeline
        if asked.crawl != "replace" or not any(spare is not None for spare in group.spares):
            return None
        return self._crawling.to_replace(asked.crawl_s)

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
                self.group = group = replace(group, head=None, address=None)
            try:
                self.group = group = await repair_group(self._version.config, group, dead)
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
        self.group = group
        await self._lose(why)

    async def _lose(self, why: str) -> None:
        """Give the pipeline up: its requests end with an error, its actors and resources are freed."""
        group, self.group = self.group, None
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
