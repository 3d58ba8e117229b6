"""A pipeline whose stages are processes of their own, one GPU each, joined by the edges that the application has.

As serve_app/local.py in what it offers; Ray, which the application starts its actors with, is left out. The Head is in
the process that makes the pipeline. For benchmarks on a host with several GPUs, or one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve_app.engine.engine import BoxKind, LendsRows
from serve_app.engine.load import LoadOptions, load_engine, shards_of
from serve_app.errors import PipelineError
from serve_app.local import LocalLimits
from serve_app.messages.request import Event, FailedEvent, FinishedEvent
from serve_app.pipeline.facts import PipelineFacts, can_reuse_pages
from serve_app.pipeline.head import Head
from serve_app.pipeline.stage import Stage
from serve_app.pipeline.warm_up import warm_up_request
from serve_app.pipeline.witness import StageSpan
from serve_app.receipts.identity import NodeIdentity, RegisteredNode, Registry
from serve_app.receipts.rows import Boundary
from serve_app.receipts.statement import StatementChain
from serve_app.scheduling.flights import flights_ahead, lookahead, max_flights
from serve_app.scheduling.scheduler import Scheduler
from serve_app.transport.edge import Edge
from serve_app.transport.handshake import EdgeAddress, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from shard_tools.cid import Cid
from shard_tools.fetch import load_manifest
from shard_tools.manifest import Manifest
from shard_tools.placement.min_max import plan as plan_by_weight
from shard_tools.signing import Envelope, PublicKey, Signer
from shard_tools.store.directory import DirectoryStore

_EPOCH, _LIFETIME_S, _START_S = 1, 86_400, 500
_KEPT = 4096  # steps


@dataclass(frozen=True, slots=True)
class _Spec:
    stage: int
    n_stages: int
    start: int
    stop: int
    store: Path
    manifest: Cid
    options: LoadOptions
    limits: LocalLimits
    switch_interval_s: float


@dataclass(frozen=True, slots=True)
class _Report:
    pid: int
    node: PublicKey
    certificate: Envelope
    description: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step in one stage, in seconds of the host's clock. spans: sequences with rows in it."""

    rows: int
    spans: int
    began: float  # to launch it
    launched: float
    ended: float  # its rows and tokens are at hand


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one stage. times: of the last steps with rows, by number."""

    rows_hashed: int
    steps: int
    busy_s: float
    times: dict[int, StepTimes]


class ProcessPipeline:
    """Made and used in one event loop.

    gpus: the device of each stage; None: as each process finds them. lend: rows stay on the GPU where they can.
    """

    def __init__(
        self,
        store: Path,
        manifest: Manifest,
        *,
        stages: int,
        options: LoadOptions,
        limits: LocalLimits,
        gpus: list[int] | None = None,
        switch_interval_s: float = 1e-5,
        lend: bool = True,
    ) -> None:
        """Returns once every stage is ready for steps. Raises PipelineError."""
        self.operator, self.manifest = Signer.fresh(), manifest
        self._closed = False
        spawn, node, now_s = multiprocessing.get_context("spawn"), NodeIdentity(Signer.fresh()), int(time.time())
        self._children: list[tuple[Any, Connection]] = []
        for i, (start, stop) in enumerate(plan_by_weight(manifest, stages)):
            spec = _Spec(i, stages, start, stop, store, manifest.cid, options, limits, switch_interval_s)
            here, there = spawn.Pipe()
            process = spawn.Process(target=_stage_main, args=(there, spec), daemon=True)
            if gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus[i])  # the child's, which sees no other
            process.start()
            there.close()
            self._children.append((process, here))
        if gpus is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        reports: list[_Report] = [self._hear(i) for i in range(stages)]
        self.description = reports[0].description

        peers = [Peer(f"stage {i}", r.node, r.pid) for i, r in enumerate(reports)]
        me = Peer("the head", node.key, os.getpid())
        loop = asyncio.get_running_loop()
        replies = [
            Inlet(f"stage {i} > head", "shared_memory", peer, self._take(loop), _lost) for i, peer in enumerate(peers)
        ]
        self._listener = EdgeListener(_EPOCH, replies, "127.0.0.1", None)
        addresses: list[EdgeAddress] = []
        for i in range(stages):
            self._tell(i, (f"{i - 1} > {i}", peers[i - 1] if i else me))
            addresses.append(self._hear(i))
        first = dial_shared_memory(Outlet("-1 > 0", "shared_memory", peers[0], addresses[0]), _EPOCH, _lost)
        for i in range(stages):
            after = None
            if i + 1 < stages:
                after = Outlet(f"{i} > {i + 1}", "shared_memory", peers[i + 1], addresses[i + 1])
            self._tell(i, (Outlet(f"stage {i} > head", "shared_memory", me, self._listener.address), after))
        self.timings: list[dict[str, float]] = [self._hear(i) for i in range(stages)]
        self.past_host: list[bool] = []  # rows of each stage but the last, then the tokens of the last
        if lend and stages > 1:
            self.past_host = [self._join_gpus("rows", i, i + 1) for i in range(stages - 1)]
            self.past_host.append(all(self.past_host) and self._join_gpus("tokens", stages - 1, 0))
        certificates = tuple(r.certificate for r in reports)
        nodes = [RegisteredNode(r.node, f"stage {i}") for i, r in enumerate(reports)]
        registry = Registry.of([*nodes, RegisteredNode(node.key, "the head")], 1, now_s, _LIFETIME_S)
        self.head = self._lead(first, certificates, registry.seal(self.operator), node, limits, options, now_s)
        if self.past_host and self.past_host[-1]:
            self.head.look_ahead()

    def _lead(
        self,
        first: Edge,
        certificates: tuple[Envelope, ...],
        registry: Envelope,
        node: NodeIdentity,
        limits: LocalLimits,
        options: LoadOptions,
        now_s: int,
    ) -> Head:
        stages, manifest = len(self._children), self.manifest
        scheduler = Scheduler(
            epoch=_EPOCH,
            n_pages=limits.n_pages,
            page_size=options.page_size,
            max_step_tokens=limits.max_step_tokens,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            micro_batches=stages,
            lookahead=lookahead(stages),
            prefix_cache=limits.prefix_cache and can_reuse_pages(options.page_size),
        )
        facts = PipelineFacts(
            epoch=_EPOCH,
            manifest=manifest.cid,
            n_stages=stages,
            context_length=manifest.context_length,
            vocab_size=manifest.vocab_size,
            max_flights=max_flights(stages),
            step_timeout_s=60.0,
            certificates=certificates,
            registry=registry,
            expires_s=now_s + _LIFETIME_S,
        )
        return Head(facts, scheduler, first, node.open_session("head", _EPOCH, now_s, _LIFETIME_S))

    async def warm_up(self) -> None:
        """Generate a token and a receipt. Raises PipelineError if that fails."""
        ended: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def see(event: Event) -> None:
            if isinstance(event, FinishedEvent | FailedEvent):
                ended.set_result(event)

        self.head.submit(warm_up_request(self.manifest.cid), see)
        event = await ended
        if isinstance(event, FailedEvent):
            raise PipelineError(f"the pipeline cannot generate: {event.message}")

    def counters(self) -> list[Counters]:
        """Of each stage."""
        for i in range(len(self._children)):
            self._tell(i, "counters")
        return [self._hear(i) for i in range(len(self._children))]

    def hops_us(self) -> list[float]:
        """Of the last steps, each hop: from the end of the step in one stage to its launch in the next."""
        times = [counters.times for counters in self.counters()]
        return [
            (after[step].launched - before[step].ended) * 1e6
            for before, after in itertools.pairwise(times)
            for step in before.keys() & after.keys()
        ]

    def close(self) -> None:
        """End every process."""
        if not self._closed:
            self._closed = True
            self.head.fail("it was closed")
            for i in range(len(self._children)):
                self._tell(i, "close")
            for process, _ in self._children:
                process.join(20)
                process.kill()
            self._listener.close()

    def _join_gpus(self, kind: BoxKind, sender: int, receiver: int) -> bool:
        """As serve_app/cluster/wiring.py."""

        def ask(stage: int, *what: object) -> Any:
            self._tell(stage, what)
            return self._hear(stage)

        offer = ask(receiver, "offer_inbox", kind, flights_ahead(len(self._children)) + 1)
        if offer is None or not ask(sender, "try_outbox", kind, offer) or not ask(receiver, "got_probe", kind):
            return False
        ask(sender, "use_outbox", kind)
        return True

    def _take(self, loop: asyncio.AbstractEventLoop) -> Callable[[bytes], None]:
        def take(reply: bytes) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: self.head.deliver(reply))

        return take

    def _tell(self, stage: int, what: object) -> None:
        self._children[stage][1].send(what)

    def _hear(self, stage: int) -> Any:
        process, here = self._children[stage]
        if not here.poll(_START_S) or not process.is_alive():
            raise PipelineError(f"stage {stage} did not start")
        return here.recv()


def _stage_main(parent: Connection, spec: _Spec) -> None:
    """A stage's process: what serve_app/cluster/stage_host.py does, told by a pipe."""
    sys.setswitchinterval(spec.switch_interval_s)
    store = DirectoryStore(spec.store)
    manifest = load_manifest(store, spec.manifest)
    began = time.perf_counter()
    engine: Any = load_engine(store, manifest, spec.start, spec.stop, spec.options)
    loaded = time.perf_counter()
    identity = NodeIdentity(Signer.fresh())
    session = identity.open_session("stage", _EPOCH, int(time.time()), _LIFETIME_S)
    parent.send(_Report(os.getpid(), identity.key, session.certificate, engine.profile.description))
    held: list[Stage] = []
    edge, peer = parent.recv()
    listener = EdgeListener(
        _EPOCH, [Inlet(edge, "shared_memory", peer, lambda m: held[0].deliver(m), _lost)], "127.0.0.1", None
    )
    parent.send(listener.address)
    head, after = parent.recv()
    reserving = time.perf_counter()
    engine.reserve(spec.limits.n_pages, spec.limits.max_running)
    outlet = Boundary(manifest.cid, spec.stop, engine.profile.dtype, manifest.hidden_size)
    span = StageSpan(
        manifest=manifest.cid,
        stage=spec.stage,
        n_stages=spec.n_stages,
        start=spec.start,
        stop=spec.stop,
        shards=shards_of(manifest, spec.start, spec.stop),
        profile=engine.profile.description[:200],
        inlet=StageSpan.inlet_of(manifest.cid, spec.start, outlet),
        outlet=outlet,
    )
    stage = Stage(
        engine,
        span,
        StatementChain(session),
        page_size=spec.options.page_size,
        next=dial_shared_memory(after, _EPOCH, _lost) if after is not None else None,
        head=dial_shared_memory(head, _EPOCH, _lost),
        epoch=_EPOCH,
    )
    held.append(stage)
    times = _keep_times(stage, engine)
    ready = time.perf_counter()
    timings = {"load_s": loaded - began, "ready_s": ready - reserving, **getattr(engine, "timings", {})}
    parent.send({name: round(value, 2) for name, value in timings.items()})
    while (said := parent.recv()) != "close":
        if said != "counters":
            parent.send(getattr(engine, said[0])(*said[1:]) if isinstance(engine, LendsRows) else None)
            if said == ("use_outbox", "rows"):
                stage.hand_on_early()
            continue
        parent.send(Counters(stage.witness.rows_hashed, stage.steps, stage.busy_s, dict(times)))
    listener.close()
    os._exit(0)  # whatever its threads wait for


def _keep_times(stage: Stage, engine: Any) -> OrderedDict[int, StepTimes]:
    """Of the last steps, kept from now on."""
    times: OrderedDict[int, StepTimes] = OrderedDict()
    collect, launch = stage._collect, engine.launch
    launches: dict[int, tuple[float, float]] = {}

    def launching(plan: Any, rows: Any) -> Any:
        began = time.perf_counter()
        flight = launch(plan, rows)
        launches[plan.step] = began, time.perf_counter()
        return flight

    def collecting(flight: Any) -> None:
        plan = flight.plan
        with contextlib.suppress(Exception):  # told by _collect itself
            flight.launched.result()
        began, launched = launches.pop(plan.step, (0.0, 0.0))
        if plan.rows:
            times[plan.step] = StepTimes(plan.rows, len(plan.spans), began, launched, time.perf_counter())
            if len(times) > _KEPT:
                times.popitem(last=False)
        collect(flight)

    stage._collect, engine.launch = collecting, launching  # type: ignore[method-assign]
    return times


def _lost(peer: str, why: str) -> None:
    print(f"{peer} is gone: {why}", file=sys.stderr, flush=True)
