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
from typing import Any, Literal

from serve_app.cluster.ray_edge import InOrder, RayEdge
from serve_app.engine.engine import BoxKind
from serve_app.errors import PipelineError
from serve_app.receipts.identity import NodeIdentity
from serve_app.scheduling.flights import flights_ahead
from serve_app.transport.edge import Deliver, Edge, Lost
from serve_app.transport.handshake import EdgeAddress, EdgeKind, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from serve_app.transport.tcp import dial_tcp
from shard_tools.signing import PublicKey

EdgeMode = Literal["auto", "ray", "tcp"]
Kind = EdgeKind | Literal["ray"]
HEAD = "the head"


@dataclass(frozen=True, slots=True)
class Party:
    """One process of a pipeline, as the others must know it."""

    name: str  # for people: "stage 1"
    node: PublicKey
    pid: int
    ray_node: str  # Ray's id of the node it runs on: processes with the same one share a kernel
    address: str  # of its host


@dataclass(frozen=True, slots=True)
class Member:
    """A party and the actor it is."""

    party: Party
    actor: Any


@dataclass(frozen=True, slots=True)
class Awaited:
    """An edge that the receiver of this is to let in."""

    edge: str
    kind: EdgeKind
    peer: Peer


@dataclass(frozen=True, slots=True)
class Joint:
    """An edge that the receiver of this is to open."""

    edge: str
    kind: Kind
    peer: Peer
    address: EdgeAddress | None  # None with Ray
    actor: Any  # None without


def kind_between(mode: EdgeMode, a: Party, b: Party) -> Kind:
    """How rows go from a to b."""
    if mode == "auto":
        return "shared_memory" if a.ray_node == b.ray_node else "tcp"
    return mode


async def wire(
    mode: EdgeMode, epoch: int, head: Member, stages: Sequence[Member], n_pages: int, max_requests: int
) -> None:
    """Every edge of the pipeline is open when this returns. Raises PipelineError, RayError.

    epoch: a part of the edges' names, so that nothing of the one before is taken for its. n_pages, max_requests: what
    the stages make room for while they connect.
    """
    members = [head, *stages]
    pairs = [(head, stages[0]), *itertools.pairwise(stages), *((stage, head) for stage in stages)]
    awaited: dict[str, list[Awaited]] = {member.party.name: [] for member in members}
    for a, b in pairs:
        kind = kind_between(mode, a.party, b.party)
        if kind != "ray":
            awaited[b.party.name].append(Awaited(_name(a, b, epoch), kind, _peer(a.party)))
    found = await asyncio.gather(*(member.actor.listen.remote(awaited[member.party.name]) for member in members))
    addresses = dict(zip((member.party.name for member in members), found, strict=True))

    def joint(a: Member, b: Member) -> Joint:
        kind = kind_between(mode, a.party, b.party)
        address = None if kind == "ray" else addresses[b.party.name]
        return Joint(_name(a, b, epoch), kind, _peer(b.party), address, b.actor if kind == "ray" else None)

    await head.actor.connect.remote(joint(head, stages[0]))
    after = [*(joint(a, b) for a, b in itertools.pairwise(stages)), None]
    await asyncio.gather(
        *(
            stage.actor.connect.remote(joint(stage, head), following, n_pages, max_requests)
            for stage, following in zip(stages, after, strict=True)
        )
    )
    if mode == "auto" and len(stages) > 1:
        passed = await asyncio.gather(*(_join_gpus("rows", a, b, len(stages)) for a, b in itertools.pairwise(stages)))
        if all(passed) and await _join_gpus("tokens", stages[-1], stages[0], len(stages)):
            await head.actor.look_ahead.remote()


async def _join_gpus(kind: BoxKind, a: Member, b: Member, n_stages: int) -> bool:
    """Rows or tokens go from a's GPU to b's past the host, if both can; whether they do."""
    if a.party.ray_node != b.party.ray_node:
        return False
    offer = await b.actor.offer_inbox.remote(kind, flights_ahead(n_stages) + 1)
    if offer is None or not await a.actor.try_outbox.remote(kind, offer) or not await b.actor.got_probe.remote(kind):
        return False
    await a.actor.use_outbox.remote(kind)
    return True


class EdgeSet:
    """The edges of one actor. Its own methods block; the actor calls them outside its event loop."""

    def __init__(self, identity: NodeIdentity, epoch: int, lifetime_s: int, deliver: Deliver, lost: Lost) -> None:
        """deliver, lost: for whatever comes in, and for any neighbour; called from threads of the edges."""
        self._identity, self._epoch, self._lifetime_s = identity, epoch, lifetime_s
        self._to, self._lost_to = deliver, lost
        self._listener: EdgeListener | None = None
        self._opened: list[Edge] = []
        self._by_ray: dict[str, InOrder] = {}
        self._closed = False
        self.gone: set[str] = set()  # neighbours that were lost, by name

    def listen(self, awaited: Sequence[Awaited], host: str) -> EdgeAddress | None:
        """Let these neighbours in. Returns where; None if there are none. Raises PipelineError."""
        if not awaited:
            return None
        inlets = [Inlet(a.edge, a.kind, a.peer, self._deliver, self._lost) for a in awaited]
        tls = self._credentials() if any(a.kind == "tcp" for a in awaited) else None
        self._listener = EdgeListener(self._epoch, inlets, host, tls)
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


def _name(a: Member, b: Member, epoch: int) -> str:
    return f"{a.party.name} > {b.party.name} ({epoch})"


def _peer(party: Party) -> Peer:
    return Peer(party.name, party.node, party.pid)
