"""The Supervisor: keeps the pipelines of one version of the application, and removes them when nobody needs them.

What each pipeline takes is pipeline_watch.py's to see to. Here is what they have in common: which release they serve,
how many there are to be, who audits them, and who makes room for whom.
A detached, restartable actor that owns nothing whose death would take children along: pipelines are detached
placement groups and actors with names, which a restarted Supervisor finds again. Ingresses hold leases; when the
last one lapses, everything is removed and the Supervisor ends, so that `serve shutdown` leaves nothing.
Each version of the application (version.py) has one. While Serve replaces one version by the next, both are there. If
there is no room for that, the older one's pipelines end first, one by one until the newer one has a place for its
first: each takes nothing new, and lets what runs come to its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from typing import Any

import ray

from serve_app.cluster.actors import known_groups, names_of, placed_groups, supervisors, tear_down
from serve_app.cluster.audit_watch import AuditWatch
from serve_app.cluster.pipeline_group import adopt_group
from serve_app.cluster.pipeline_watch import PipelineWatch
from serve_app.cluster.specs import NAMESPACE, GroupPlan, Place, supervisor_name
from serve_app.cluster.version import find_record
from serve_app.config import AppConfig
from serve_app.errors import PipelineError, ReplacedError
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value
from shard_tools.index.model_index import ModelRecord

_log = logging.getLogger(__name__)

# An ingress renews every second, and gives its lease back when it is shut down. One that is killed does not: Serve puts
# another in its place within 13 s on two cores, for which the pipelines must wait and not be loaded anew.
LEASE_S = 30.0
_NEXT_LEASE_S = (
    20.0  # after the last one was given back: `serve deploy` may replace the only ingress, and it starts then
)
_FIRST_LEASE_S = 60.0  # after the start: an ingress that never came will not come
_WATCH_EVERY_S = 1.0
_TOLD_S = 3.0  # after a restart: ingresses say what is served, and by how many, with their next lease, every second
_YIELD_S = 5.0  # for another version's Supervisor to hear that it is to make room
_REPLACED = "a newer version of the application takes its place"


class _SupervisorProcess:
    """One per cluster and version, named so in NAMESPACE. Implements pipeline_watch.py's Version."""

    def __init__(self, args: dict[str, Any], version: str) -> None:
        """args: of our Serve application, as AppConfig.parse takes them. version: as version_of."""
        self.config, self.name, self.audits = AppConfig.parse(args), version, AuditWatch()
        self._record: ModelRecord | None = None  # of the model; kept, whatever its name leads to later
        self._adopted = asyncio.Event()
        self._began = 0.0  # of the youngest ingress, Unix time: which version is to be there, says the youngest
        self._replicas: int | None = None  # how many pipelines it says there are to be; None: it has not said
        self._yields_to: float | None = None  # when an ingress of another version began, for which this one makes room
        self._leases: dict[str, float] = {}
        self._released = float("-inf")  # when one was given back last
        self._born = self._made = time.monotonic()
        self._watches: dict[int, PipelineWatch] = {}
        self._main: asyncio.Task[None] | None = None

    async def lease(self, ingress: str, began: float, record: ModelRecord | None, replicas: int) -> Place:
        """An ingress of this version is alive. Returns which process this is, to be killed should it hang.

        began: when it was made, Unix time. record: of the model that it serves, if it knows already. replicas: how many
        pipelines it was configured to have.
        """
        self._leases[ingress] = time.monotonic()
        self._record = self._record or record
        if began >= self._began:
            self._began, self._replicas = began, replicas
            self.config = replace(self.config, pipeline=replace(self.config.pipeline, replicas=replicas))
        if self._yields_to is not None and began > self._yields_to:
            self._yields_to = None  # this version has been rolled out again
        self._begin()
        return Place("", -1, os.getpid(), ray.get_runtime_context().get_node_id())

    async def record(self) -> ModelRecord:
        """The model that this version serves, from its first answer on. Raises LlmdError if it cannot be had."""
        self._begin()
        await self._adopted.wait()
        if self._record is None:
            found = await asyncio.get_running_loop().run_in_executor(None, find_record, self.config)
            self._record = self._record or found
        return self._record

    async def make_way(self, began: float) -> None:
        """A version whose youngest ingress began then finds no room: if it is the younger one, one pipeline ends.

        The next, if it asks again and that one has ended; those that have no room themselves, at once.
        """
        if began <= self._began or self._replicas is None:
            return  # no ingress has spoken since this process began: it is asked again
        if self._yields_to is None:
            _log.warning("version %s makes room for a newer one", self.name)
        self._yields_to = max(began, self._yields_to or began)
        watches = [self._watches[replica] for replica in sorted(self._watches)]
        serves = any(watch.group is not None for watch in watches)
        for watch in watches:
            if watch.group is None and (serves or not watch.was_there):  # else requests may wait for it, and it alone
                watch.retire(_REPLACED, at_once=True)
        left = [watch for watch in watches if not watch.is_over]
        if not any(watch.retires for watch in left) and left:
            left[-1].retire(_REPLACED, at_once=False)

    def _begin(self) -> None:
        if self._main is None:
            self._main = asyncio.get_running_loop().create_task(self._supervise())

    async def release(self, ingress: str) -> None:
        """An ingress ends in good order."""
        self._leases.pop(ingress, None)
        # Whoever released has been here: no waiting for a first one, and not long for a next.
        self._born, self._released = float("-inf"), time.monotonic()

    async def head_address(self, replica: int) -> LinkAddress:
        """Where the Head of this pipeline listens. Raises PipelineError while there is none, ReplacedError for good."""
        watch = self._watches.get(replica)
        if watch is not None:
            return watch.address()
        if self._replicas is not None and replica >= self._replicas:
            raise ReplacedError(f"there are {self._replicas} pipelines now")
        raise PipelineError("the pipeline is starting")

    async def status(self) -> dict[str, Value]:
        """What is there, for tests and people."""
        watches = [self._watches[replica] for replica in sorted(self._watches)]
        return {"ingresses": len(self._leases), "pipelines": [watch.status() for watch in watches]}

    async def ask_for_room(self, replica: int) -> bool:
        """As Version. One pipeline asks for all.

        Once it has a place, the others' come when the ingresses of the older version have gone: until then they have
        somewhere to send requests.
        """
        others = [actor for name, actor in supervisors().items() if name != supervisor_name(self.name)]
        waiting = [watch.replica for watch in self._watches.values() if watch.group is None and not watch.retires]
        if others and replica == min(waiting, default=replica) and not placed_groups(self.name):
            asked = [asyncio.ensure_future(other.make_way.remote(self._began)) for other in others]
            await asyncio.wait(asked, timeout=_YIELD_S)  # one that does not answer yields nothing: no room, says Ray
        return bool(others) or self.config.pipeline.stages_at_least is None

    def beside(self, replica: int) -> list[GroupPlan]:
        """As Version."""
        watches = self._watches.values()
        return [watch.group.spec.plan for watch in watches if watch.replica != replica and watch.group is not None]

    async def _supervise(self) -> None:
        try:
            await self._adopt()
        except Exception:  # then all is made anew
            _log.exception("what was there before cannot be gone on with")
        self._adopted.set()
        while self._wanted():
            try:
                await self._match()
                there = [self._watches[replica].group for replica in sorted(self._watches)]
                self.audits.tick(self.config, [group for group in there if group is not None])
            except Exception:  # whatever it was: nobody would miss a Supervisor that had ended
                _log.exception("the pipelines cannot be looked after")
            await asyncio.sleep(_WATCH_EVERY_S)
        _log.info("nobody serves version %s any more", self.name)
        await asyncio.gather(*(watch.stop() for watch in self._watches.values()), self.audits.stop())
        for group in known_groups(self.name):
            tear_down(group)
        # Not exit_actor: it ends an actor by an exception, which a background task cannot raise to Ray.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _match(self) -> None:
        """There are as many pipelines as there are to be, or they are on their way."""
        if self._replicas is None:
            return  # nobody has said so since this process began
        for replica in range(self._replicas):
            watch = self._watches.get(replica)
            if self._yields_to is not None:
                continue
            if watch is None:
                watch = self._watches[replica] = PipelineWatch(replica, self)
                watch.start()
            watch.stay()
        if time.monotonic() - self._made < _TOLD_S:
            return  # the youngest ingress may not have spoken yet
        for replica in [replica for replica in self._watches if replica >= self._replicas]:
            watch = self._watches[replica]
            watch.retire(f"there are to be {self._replicas} pipelines", at_once=True)
            if watch.is_over:
                await watch.stop()
                del self._watches[replica]

    async def _adopt(self) -> None:
        """The pipelines of a Supervisor before this one go on; what is none goes."""
        for group in sorted(known_groups(self.name), reverse=True):
            known = group.replica in self._watches
            found = None if known else await adopt_group(self.config, names_of(group))
            if found is None:
                tear_down(group)
                continue
            watch = self._watches[group.replica] = PipelineWatch(group.replica, self, found)
            watch.start()
            stage = found.spec.plan.stages[0]
            self._record = self._record or ModelRecord(stage.manifest, stage.signature)
        until = time.monotonic() + _TOLD_S
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        while restarted and self._record is None and time.monotonic() < until:
            await asyncio.sleep(0.1)

    def _wanted(self) -> bool:
        now = time.monotonic()
        self._leases = {i: t for i, t in self._leases.items() if now - t < LEASE_S}
        return bool(self._leases) or now - self._born < _FIRST_LEASE_S or now - self._released < _NEXT_LEASE_S


SupervisorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(_SupervisorProcess)


def supervisor_of(args: dict[str, Any], version: str) -> Any:
    """The cluster's Supervisor of this version, made with this configuration if there is none."""
    return SupervisorActor.options(
        name=supervisor_name(version), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(args, version)
