"""Which processes of a pipeline are joined by which kind of edge, and one process's own edges.

The Supervisor decides (`wire`): shared memory on one host, TLS between hosts, or Ray's actor calls if the configuration
says so. It tells every process whom to await, then every process whom to call: first all listen, then the Head opens
its edge, then the stages theirs, so that nobody speaks to one that is not there yet. Between two GPUs of one host the
rows themselves go past the host, and an edge carries a reference to them; so do the tokens, from the last stage to the
first.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serve_app.cluster.ray_edge import InOrder, RayEdge
from serve_app.engine.engine import BoxKind
from serve_app.errors import PipelineError
from serve_app.messages.step import MAX_PAYLOAD_BYTES
from serve_app.receipts.identity import NodeIdentity
from serve_app.scheduling.flights import flights_ahead
from serve_app.transport.edge import Deliver, Edge, Lost
from serve_app.transport.handshake import EdgeAddress, EdgeKind, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from serve_app.transport.tcp import dial_tcp
from shard_tools.signing import PublicKey

EdgeMode = Literal["auto", "ray", "tcp"]
DeliveryMode = Literal["auto", "always", "never"]
Kind = EdgeKind | Literal["ray"]
HEAD = "the head"


@dataclass(frozen=True, slots=True)
class Party:
    """One process of a pipeline, as the others must know it."""

    name: str  # for people: "stage 1"
    node: PublicKey
    pid: int
    ray_node: str  # Ray's id of the node it runs on: processes with the same one share a kernel; "": on none of Ray's
    address: str  # of its host

    def is_beside(self, other: Party) -> bool:
        """Whether the two share a kernel."""
        return self.ray_node == other.ray_node != ""


@dataclass(frozen=True, slots=True)
class Leader:
    """The Head: a party and the actor it is."""

    party: Party
    actor: Any


@dataclass(frozen=True, slots=True)
class Awaited:
    """An edge that the receiver of this is to let in."""

    edge: str
    kind: Kind  # one of Ray's calls needs no letting in
    peer: Peer
    signed: bool = False  # who sends signs for its rows


@dataclass(frozen=True, slots=True)
class Joint:
    """An edge that the receiver of this is to open."""

    edge: str
    kind: Kind
    peer: Peer
    address: EdgeAddress | None  # None with Ray
    actor: Any  # None without
    signed: bool = False  # as Awaited's


class Joinable(Protocol):
    """A stage, as far as it is joined to others. Methods as StageHost's; they raise RayError or PipelineError."""

    @property
    def actor(self) -> Any | None:
        """The Ray actor it is; None if it is none."""

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None: ...

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None: ...

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None: ...

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool: ...

    async def got_probe(self, kind: BoxKind) -> bool: ...

    async def use_outbox(self, kind: BoxKind) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """A stage, and who it is to its neighbours."""

    party: Party
    stage: Joinable


def kind_between(mode: EdgeMode, a: Party, b: Party) -> Kind:
    """How rows go from a to b."""
    if mode == "auto":
        return "shared_memory" if a.is_beside(b) else "tcp"
    on_ray = a.ray_node and b.ray_node
    return mode if on_ray else "tcp"


def signed_between(mode: DeliveryMode, a: Party, b: Party) -> bool:
    """Whether stage a signs for the rows that it sends to stage b: where it might be another operator's word."""
    return mode == "always" or (mode == "auto" and not (a.ray_node and b.ray_node))


async def wire(
    mode: EdgeMode,
    epoch: int,
    head: Leader,
    stages: Sequence[Member],
    n_pages: int,
    max_requests: int,
    deliveries: DeliveryMode = "auto",
) -> None:
    """Every edge of the pipeline is open when this returns. Raises PipelineError, RayError.

    epoch: a part of the edges' names, so that nothing of the one before is taken for its. n_pages, max_requests: what
    the stages make room for while they connect.
    """
    parties = [head.party, *(stage.party for stage in stages)]
    actors = {HEAD: head.actor} | {stage.party.name: stage.stage.actor for stage in stages}
    pairs = [*itertools.pairwise(parties), *((party, head.party) for party in parties[1:])]
    awaited: dict[str, list[Awaited]] = {party.name: [] for party in parties}

    def signs(a: Party, b: Party) -> bool:
        return head.party not in (a, b) and signed_between(deliveries, a, b)

    for a, b in pairs:
        awaited[b.name].append(Awaited(_name(a, b, epoch), kind_between(mode, a, b), _peer(a), signs(a, b)))
    found = await asyncio.gather(
        head.actor.listen.remote(awaited[HEAD]), *(s.stage.listen(awaited[s.party.name]) for s in stages)
    )
    addresses = dict(zip((party.name for party in parties), found, strict=True))

    def joint(a: Party, b: Party) -> Joint:
        kind = kind_between(mode, a, b)
        address = None if kind == "ray" else addresses[b.name]
        actor = actors[b.name] if kind == "ray" else None
        return Joint(_name(a, b, epoch), kind, _peer(b), address, actor, signs(a, b))

    await head.actor.connect.remote(joint(head.party, parties[1]))
    after = [*(joint(a, b) for a, b in itertools.pairwise(parties[1:])), None]
    await asyncio.gather(
        *(
            stage.stage.connect(joint(stage.party, head.party), following, n_pages, max_requests)
            for stage, following in zip(stages, after, strict=True)
        )
    )
    if mode == "auto" and len(stages) > 1:
        passed = await asyncio.gather(*(_join_gpus("rows", a, b, len(stages)) for a, b in itertools.pairwise(stages)))
        if all(passed) and await _join_gpus("tokens", stages[-1], stages[0], len(stages)):
            await head.actor.look_ahead.remote()


async def _join_gpus(kind: BoxKind, a: Member, b: Member, n_stages: int) -> bool:
    """Rows or tokens go from a's GPU to b's past the host, if both can; whether they do."""
    if not a.party.is_beside(b.party):
        return False
    offer = await b.stage.offer_inbox(kind, flights_ahead(n_stages) + 1)
    if offer is None or not await a.stage.try_outbox(kind, offer) or not await b.stage.got_probe(kind):
        return False
    await a.stage.use_outbox(kind)
    return True


class EdgeSet:
    """The edges of one actor. Its own methods block; the actor calls them outside its event loop."""

    def __init__(
        self,
        identity: NodeIdentity,
        epoch: int,
        lifetime_s: int,
        deliver: Deliver,
        lost: Lost,
        max_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        """deliver, lost: for whatever comes in, and for any neighbour; called from threads of the edges.

        max_bytes: of one message that comes in.
        """
        self._max_bytes = max_bytes
        self._identity, self._epoch, self._lifetime_s = identity, epoch, lifetime_s
        self._to, self._lost_to = deliver, lost
        self._listener: EdgeListener | None = None
        self._opened: list[Edge] = []
        self._by_ray: dict[str, InOrder] = {}
        self._closed = False
        self.gone: set[str] = set()  # neighbours that were lost, by name

    def listen(self, awaited: Sequence[Awaited], host: str, port: int = 0) -> EdgeAddress | None:
        """Let these neighbours in. port: for TCP, 0 for any. Returns where, None if there are none.

        Raises PipelineError.
        """
        inlets = [
            Inlet(a.edge, a.kind, a.peer, self._deliver, self._lost, self._max_bytes)
            for a in awaited
            if a.kind != "ray"
        ]
        if not inlets:
            return None
        tls = self._credentials() if any(a.kind == "tcp" for a in awaited) else None
        self._listener = EdgeListener(self._epoch, inlets, host, tls, port)
        return self._listener.address

    def open(self, joint: Joint) -> Edge:
        """The sending end of this edge. Raises PipelineError."""
        edge = self._open(joint)
        self._opened.append(edge)
        return edge

    def close(self) -> None:
        """Nothing goes or comes by these edges any more, and nobody is told of it. Blocks for some seconds at most."""
        self._closed = True
        for edge in self._opened:
            edge.close()
        if self._listener is not None:
            self._listener.close()

    def _open(self, joint: Joint) -> Edge:
        if joint.kind == "ray":
            return RayEdge(joint.actor, joint.edge)
        if joint.address is None:
            raise PipelineError(f"{joint.peer.name} listens nowhere")
        outlet = Outlet(joint.edge, joint.kind, joint.peer, joint.address)
        if joint.kind == "tcp":
            return dial_tcp(outlet, self._epoch, self._credentials(), self._lost)
        return dial_shared_memory(outlet, self._epoch, self._lost)

    def _deliver(self, message: bytes) -> None:
        if not self._closed:
            self._to(message)

    def _lost(self, peer: str, why: str) -> None:
        if not self._closed:
            self.gone.add(peer)
            self._lost_to(peer, why)

    def push(self, edge: str, number: int, message: bytes) -> None:
        """Message `number` of this edge came by a Ray call; one of an epoch before is dropped."""
        if not edge.endswith(f" ({self._epoch})"):
            return
        if edge not in self._by_ray:
            self._by_ray[edge] = InOrder(self._deliver)
        self._by_ray[edge].take(number, message)

    def _credentials(self) -> bytes:
        return self._identity.certify_tls(int(time.time()), self._lifetime_s)


def _name(a: Party, b: Party, epoch: int) -> str:
    return f"{a.name} > {b.name} ({epoch})"


def _peer(party: Party) -> Peer:
    return Peer(party.name, party.node, party.pid)
