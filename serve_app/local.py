"""The whole house in one process: no Ray, no sockets. Read this file first.

    request -> Head -> Stage 0 -> Stage 1 -> ... -> Stage n-1 -> Head -> events, receipt
                (scheduler)   each: engine + witness

Each stage has its own threads, its own layers out of the block store, its own KV pages and its own session
key, as it would have on a machine of its own; only the edges between them are plain calls. What runs on a cluster
(cluster/) is the same Head and the same Stage behind other edges.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from serve_app.engine.engine import Engine
from serve_app.engine.load import LoadOptions, load_engine, shards_of
from serve_app.errors import PipelineError
from serve_app.messages.request import Event, FailedEvent, FinishedEvent, GenerationRequest, RequestId
from serve_app.pipeline.deliveries import DeliveryTerms
from serve_app.pipeline.facts import PipelineFacts, can_reuse_pages
from serve_app.pipeline.head import Head
from serve_app.pipeline.retention import Retention
from serve_app.pipeline.stage import Stage
from serve_app.pipeline.warm_up import warm_up_request
from serve_app.pipeline.witness import StageSpan
from serve_app.receipts.identity import NodeIdentity, RegisteredNode, Registry, Session
from serve_app.receipts.rows import Boundary
from serve_app.receipts.statement import StatementChain
from serve_app.scheduling.flights import lookahead, max_flights
from serve_app.scheduling.scheduler import Scheduler
from serve_app.transport.edge import LocalEdge
from shard_tools.canonical import Value
from shard_tools.manifest import Manifest
from shard_tools.placement.even import plan as plan_evenly
from shard_tools.signing import Envelope, Signer
from shard_tools.store.block_store import BlockStore

_EPOCH = 1
_LIFETIME_S = 86_400


@dataclass(frozen=True, slots=True)
class LocalLimits:
    """How much one local pipeline takes on at a time."""

    n_pages: int = 1024
    max_step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    take_turns: bool = False  # one step at a time: for stages that have the same cores
    prefix_cache: bool = False  # off, so that whoever counts rows or seconds counts what was asked for
    speculate: int = 0  # tokens guessed at most per step and sequence
    retain_bytes: int = 0  # of rows that each stage keeps for audits
    deliveries: bool = False  # stages sign for rows on their way, as between two operators


@dataclass(frozen=True, slots=True)
class Membership:
    """As whom a pipeline of this process signs, where it is not a node of its own."""

    head: Session
    chains: tuple[StatementChain, ...]  # of the stages' sessions; one that goes on in another pipeline tells one story
    registry: Envelope

    @classmethod
    def of(cls, operator: Signer, node: NodeIdentity, stages: int, now_s: int) -> Membership:
        """A node that this operator lists, alone."""
        registry = Registry.of([RegisteredNode(node.key, "this process")], 1, now_s, _LIFETIME_S)
        sessions = [node.open_session("stage", _EPOCH, now_s, _LIFETIME_S) for _ in range(stages)]
        head = node.open_session("head", _EPOCH, now_s, _LIFETIME_S)
        return cls(head, tuple(map(StatementChain, sessions)), registry.seal(operator))


class LocalPipeline:
    """A pipeline of threads; implements api/generator.py's Generator. Made and used in one event loop."""

    def __init__(
        self,
        store: BlockStore,
        manifest: Manifest,
        *,
        stages: int,
        options: LoadOptions,
        limits: LocalLimits = LocalLimits(),
        operator: Signer | None = None,
        load: Callable[[BlockStore, Manifest, int, int, LoadOptions], Engine] = load_engine,
        membership: Membership | None = None,
    ) -> None:
        """Load every stage's layers from the store. operator: signs the registry; a fresh key if not given.

        load: makes each stage's engine, the last stage's first. membership: a fresh node's if not given; who gives it
        knows the operator.
        """
        self.operator = operator or Signer.fresh()
        self.manifest = manifest
        self.node = NodeIdentity(Signer.fresh())  # signs, unless the pipeline does so as somebody else
        now_s = int(time.time())
        self.membership = membership = membership or Membership.of(self.operator, self.node, stages, now_s)
        epoch = membership.head.epoch
        loop = asyncio.get_running_loop()
        to_head = LocalEdge(lambda reply: _hand_over(loop, self.head, reply))

        self.stages: list[Stage] = []
        for i, (start, stop) in reversed(list(enumerate(plan_evenly(manifest.n_layers, stages)))):
            engine = load(store, manifest, start, stop, options)
            engine.reserve(limits.n_pages, limits.max_running)
            outlet = Boundary(manifest.cid, stop, options.dtype, manifest.hidden_size)
            span = StageSpan(
                manifest=manifest.cid,
                stage=i,
                n_stages=stages,
                start=start,
                stop=stop,
                shards=shards_of(manifest, start, stop),
                profile=engine.profile.description,
                inlet=StageSpan.inlet_of(manifest.cid, start, outlet),
                outlet=outlet,
            )
            after = LocalEdge(self.stages[0].deliver) if self.stages else None
            chain, sender = membership.chains[i], membership.chains[i - 1].session.node if i else None
            stage = Stage(
                engine,
                span,
                chain,
                page_size=options.page_size,
                next=after,
                head=to_head,
                epoch=epoch,
                retention=Retention(limits.retain_bytes) if limits.retain_bytes else None,
                deliveries=DeliveryTerms(sender, i < stages - 1) if limits.deliveries else None,
            )
            self.stages.insert(0, stage)

        scheduler = Scheduler(
            epoch=epoch,
            n_pages=limits.n_pages,
            page_size=options.page_size,
            max_step_tokens=limits.max_step_tokens,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            micro_batches=min(stages, max_flights(stages, limits.take_turns)),
            lookahead=lookahead(stages),
            prefix_cache=limits.prefix_cache and can_reuse_pages(options.page_size),
            speculate=limits.speculate,
        )
        facts = PipelineFacts(
            epoch=epoch,
            manifest=manifest.cid,
            n_stages=stages,
            context_length=manifest.context_length,
            vocab_size=manifest.vocab_size,
            max_flights=max_flights(stages, limits.take_turns),
            step_timeout_s=60.0,
            certificates=tuple(chain.session.certificate for chain in membership.chains),
            registry=membership.registry,
            expires_s=now_s + _LIFETIME_S,
        )
        self.head = Head(facts, scheduler, LocalEdge(self.stages[0].deliver), membership.head)
        self._ready = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the generator early cancels it. Raises what Head.submit raises."""
        events: asyncio.Queue[Event] = asyncio.Queue()  # max_tokens bounds it: one event a token
        self.head.submit(request, events.put_nowait)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, FinishedEvent | FailedEvent):
                    return
        finally:
            self.head.stop(request.id, keep=False)

    async def stop(self, id: RequestId) -> None:
        """End the request and keep its tokens so far."""
        self.head.stop(id, keep=True)

    def status(self) -> dict[str, Value]:
        """Load and counters."""
        return {"pipelines": [self.head.status()]}

    async def warm_up(self) -> None:
        """Generate a token and a receipt. Raises PipelineError if that fails."""
        async for event in self.generate(warm_up_request(self.manifest.cid)):
            if isinstance(event, FailedEvent):
                raise PipelineError(f"the pipeline cannot generate: {event.message}")
        self._ready = True

    async def ready(self) -> bool:
        """Whether it has generated a token and works."""
        return self._ready and self.head.failure is None

    def close(self) -> None:
        """Stop every thread; requests still running end with an error."""
        self.head.fail("it was closed")
        for stage in self.stages:
            stage.close()


def _hand_over(loop: asyncio.AbstractEventLoop, head: Head, reply: bytes) -> None:
    """From a stage's thread into the Head's event loop; a loop that has ended needs no replies."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(head.deliver, reply)
