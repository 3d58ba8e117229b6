"""The Head as a Ray actor: stages reach it by their edges, ingresses by an authenticated socket."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from serve_app.audit.desk import AuditDesk
from serve_app.cluster.audit_pump import AuditPump
from serve_app.cluster.audit_specs import terms_of
from serve_app.cluster.specs import HeadSpec, Place, Trouble
from serve_app.cluster.stage_actor import site_here
from serve_app.cluster.stage_host import SWITCH_INTERVAL_S, TROUBLE_EVERY_S, node_key_path
from serve_app.cluster.wiring import HEAD, Awaited, EdgeSet, Joint, Party
from serve_app.errors import PipelineError
from serve_app.messages.request import Event, FailedEvent, FinishedEvent
from serve_app.messages.step import MAX_REPLY_BYTES
from serve_app.pipeline.assurance import NoAudits
from serve_app.pipeline.facts import PipelineFacts, can_reuse_pages
from serve_app.pipeline.head import Head
from serve_app.pipeline.head_server import HeadServer
from serve_app.pipeline.warm_up import warm_up_request
from serve_app.receipts.identity import NodeIdentity, Session, first_expiry
from serve_app.scheduling.flights import lookahead, max_flights
from serve_app.scheduling.scheduler import Scheduler
from serve_app.transport.handshake import EdgeAddress
from serve_app.transport.link import LinkAddress
from shard_tools.canonical import Value

T = TypeVar("T")
_STEP_TIMEOUT_S = 60.0
_REPAIR_S = 180.0  # requests wait so long for a stage to be replaced: 8 GB of layers at 100 MB/s, and a new process


class _HeadProcess:
    """Made after its stages; outlives them, in one epoch after another."""

    def __init__(self, spec: HeadSpec) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)  # its edges have threads of their own, which wake its loop
        self._spec = spec
        self._identity = NodeIdentity.load_or_create(node_key_path(spec.state_dir))
        self._edges = self._edge_set(spec)
        self._head: Head | None = None  # until it has an edge to its first stage
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: HeadServer | None = None
        self._stages: list[Value] = []
        self._ready = False
        self._address: LinkAddress | None = None
        self._place: Place | None = None
        self._watch: asyncio.Task[None] | None = None
        self._desk = None if spec.audit is None else AuditDesk(terms_of(spec, spec.audit), time.monotonic)
        self._audits: dict[str, Value] = {}  # what the Supervisor says of them
        self._pump: asyncio.Task[None] | None = None

    def _edge_set(self, spec: HeadSpec) -> EdgeSet:
        return EdgeSet(
            self._identity, spec.epoch, spec.session_lifetime_s, self._take, self._stage_lost, MAX_REPLY_BYTES
        )

    async def hold(self, why: str) -> None:
        """Requests wait until `resume`."""
        if self._head is not None:
            self._head.lose(why)

    async def lead(self, spec: HeadSpec) -> None:
        """The stages of this epoch stand ready: let go of those before. Requests wait until `resume`."""
        before, self._spec, self._edges = self._edges, spec, self._edge_set(spec)
        if self._head is not None:
            self._head.lose("its stages are replaced")
        await asyncio.get_running_loop().run_in_executor(None, before.close)

    async def resume(self) -> LinkAddress:
        """Every request goes on, in the epoch it leads now. Raises PipelineError if it has given them up."""
        assert self._head is not None and self._address is not None, "resume before start"
        if self._edges.gone:
            raise PipelineError(f"{', '.join(sorted(self._edges.gone))} died meanwhile")
        self._head.resume()
        if self._head.failure is not None:
            raise PipelineError(self._head.failure)
        return self._address

    async def party(self) -> Party:
        """This process, as the stages are to know it."""
        return site_here().party(HEAD, self._identity.key)

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        """Let these stages open their edges to this Head."""
        return self._edges.listen(awaited, ray.util.get_node_ip_address())

    async def connect(self, first: Joint) -> None:
        """Open the edge to the first stage. Raises PipelineError."""
        self._loop = asyncio.get_running_loop()
        edge = await self._loop.run_in_executor(None, self._edges.open, first)
        spec = self._spec
        session = self._identity.open_session("head", spec.epoch, int(time.time()), spec.session_lifetime_s)
        facts = self._pipeline_facts(session)
        if self._head is not None:
            self._head.lead(facts, edge, session)
            return
        self._head = Head(facts, self._scheduler(), edge, session, self._desk or NoAudits())
        self._server = HeadServer(self._head, self._facts)

    async def look_ahead(self) -> None:
        """The stages pass tokens on among themselves."""
        assert self._head is not None, "look_ahead before connect"
        self._head.look_ahead()

    def _scheduler(self) -> Scheduler:
        spec = self._spec
        return Scheduler(
            epoch=spec.epoch,
            n_pages=spec.n_pages,
            page_size=spec.page_size,
            max_step_tokens=spec.max_step_tokens,
            max_running=spec.max_requests,
            max_waiting=spec.max_waiting,
            micro_batches=min(spec.n_stages, max_flights(spec.n_stages, spec.take_turns)),
            lookahead=lookahead(spec.n_stages),
            prefix_cache=spec.prefix_cache and can_reuse_pages(spec.page_size),
            speculate=spec.speculate,
        )

    def _pipeline_facts(self, session: Session) -> PipelineFacts:
        spec = self._spec
        return PipelineFacts(
            epoch=spec.epoch,
            manifest=spec.manifest,
            n_stages=spec.n_stages,
            context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            max_flights=max_flights(spec.n_stages, spec.take_turns),
            step_timeout_s=_STEP_TIMEOUT_S,
            certificates=spec.certificates,
            registry=spec.registry,
            expires_s=first_expiry((*spec.certificates, session.certificate), spec.registry, int(time.time())),
            repair_s=_REPAIR_S,
        )

    async def start(self, place: Place) -> LinkAddress:
        """Generate a first token, with receipt, through every stage; then listen. Raises PipelineError."""
        assert self._head is not None and self._server is not None, "start before connect"
        self._place = place
        self._watch = asyncio.get_running_loop().create_task(self._keep_watch())
        if self._desk is not None:
            self._pump = asyncio.get_running_loop().create_task(AuditPump(self._desk, lambda: self._spec).run())
        ended: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def see(event: Event) -> None:
            if isinstance(event, FinishedEvent | FailedEvent) and not ended.done():
                ended.set_result(event)

        self._head.submit(warm_up_request(self._spec.manifest), see)
        event = await ended
        if isinstance(event, FailedEvent):
            raise PipelineError(f"the pipeline cannot generate: {event.message}")
        self._ready = True
        self._address = await self._server.listen(ray.util.get_node_ip_address())
        return self._address

    async def know(self, spec: HeadSpec) -> None:
        """What it leads, where only spares have changed."""
        self._spec = spec

    async def serving(self) -> tuple[LinkAddress | None, HeadSpec, Place | None]:
        """Where this Head listens, if it does, and what it leads: for a Supervisor that was restarted."""
        works = self._head is not None and self._head.failure is None
        return (self._address if works else None), self._spec, self._place

    async def trouble(self, epoch: int) -> Trouble:
        """Ends when a stage of this epoch is gone, or nothing goes on for another reason; or in another epoch."""
        while self._spec.epoch == epoch:
            head = self._head
            if head is not None and head.failure is not None:
                return Trouble(head.failure, frozenset(), fatal=True)
            if head is not None and head.lost is not None:
                return Trouble(head.lost, frozenset(self._edges.gone))
            await asyncio.sleep(TROUBLE_EVERY_S)
        return Trouble("another epoch has begun", frozenset())

    async def push(self, edge: str, number: int, message: bytes) -> None:
        """Take in message `number` of this edge of Ray calls."""
        self._edges.push(edge, number, message)

    async def ping(self, stages: list[Value], audits: dict[str, Value]) -> None:
        """Alive. stages: what each said of itself, for status calls. audits: what is known of theirs, the same."""
        self._stages, self._audits = stages, audits
        if self._desk is not None:
            self._desk.learn(stages, audits)

    async def proofs(self) -> list[bytes]:
        """The latest that convict a stage of what it said about rows on their way."""
        return [] if self._head is None else list(self._head.proofs)

    async def drain(self, on: bool) -> int:
        """Take in nothing new from now on, or again. Returns how many requests are still to end."""
        return 0 if self._head is None else self._head.drain(on)

    async def fail(self, why: str) -> None:
        """End every request with an error: some part of the pipeline is gone."""
        self._ready = False
        if self._head is not None:
            self._head.fail(why)
        await asyncio.sleep(0)  # lets the events of that reach the sockets before the actor is killed

    def _take(self, reply: bytes) -> None:
        if self._head is not None:
            self._hand_over(self._head.deliver, reply)

    def _stage_lost(self, stage: str, why: str) -> None:
        if self._head is not None:
            self._hand_over(self._head.lose, f"{stage} is gone: {why}")

    def _hand_over(self, take: Callable[[T], None], what: T) -> None:
        """From whatever thread an edge has, into the loop that the Head lives in; one that has ended needs nothing."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(take, what)

    def _facts(self) -> dict[str, Value]:
        assert self._head is not None
        ready = self._ready and self._head.failure is None  # one that waits for a stage takes requests in
        facts: dict[str, Value] = {"ready": ready, "pipelines": [{**self._head.status(), "stages": self._stages}]}
        return facts if self._desk is None else {**facts, "audit": {**self._audits, **self._desk.status()}}

    async def _keep_watch(self) -> None:
        while self._head is not None:
            await asyncio.sleep(1.0)
            self._head.watch()


HeadActor: Any = ray.remote(max_restarts=0)(_HeadProcess)  # Any: Ray's actor classes have no types
