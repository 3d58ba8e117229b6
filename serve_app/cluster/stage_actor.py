"""A stage as a Ray actor: a StageHost whose blocking work is done outside the actor's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.util import get_node_ip_address

from serve_app.cluster.specs import StageReport, StageSpec, Trouble
from serve_app.cluster.stage_host import Site, StageHost
from serve_app.cluster.wiring import Awaited, Joint
from serve_app.engine.engine import ActivationDtype, BoxKind
from serve_app.transport.handshake import EdgeAddress
from shard_tools.canonical import Value
from shard_tools.signing import PublicKey

T = TypeVar("T")


class _StageProcess:
    """Async: pings and pushes are answered while the Stage's own thread computes. Methods as StageHost's."""

    def __init__(self, spec: StageSpec) -> None:
        """spec: what it may become; `take` says what it is."""
        self._spec = spec
        self._host = StageHost(spec.store, spec.state_dir, site_here())

    async def ready(self) -> None:
        """The process runs."""

    async def prepare(self, dtype: ActivationDtype) -> None:
        """Load the layers of the stage it is likely to become, so that `take` need not."""
        await _outside_the_loop(self._host.hold, self._spec, dtype)

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool:
        """Whether this host has instructions for it: all stages must compute in one dtype."""
        from serve_app.engine.load import computes_fast_in

        return computes_fast_in(dtype, self._spec.device)

    async def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        return await _outside_the_loop(self._host.take, spec, dtype)

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        return await _outside_the_loop(self._host.listen, awaited)

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        await _outside_the_loop(self._host.connect, head, after, n_pages, max_requests)

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        return await _outside_the_loop(self._host.offer_inbox, kind, places)

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        return await _outside_the_loop(self._host.try_outbox, kind, offer)

    async def got_probe(self, kind: BoxKind) -> bool:
        return await _outside_the_loop(self._host.got_probe, kind)

    async def use_outbox(self, kind: BoxKind) -> None:
        self._host.use_outbox(kind)

    async def push(self, edge: str, number: int, message: bytes) -> None:
        self._host.push(edge, number, message)

    async def trouble(self, epoch: int) -> Trouble:
        return await self._host.trouble(epoch)

    async def node_key(self) -> PublicKey:
        """Of the node it runs on."""
        return self._host.key

    async def hold(self, request: bytes, attempt: int, promised: bool) -> None:
        """As Retention; nothing happens where no rows are kept."""
        if self._host.showing is not None:
            self._host.showing.retention.hold(request, attempt, promised=promised)

    async def show(self, request: bytes, attempt: int, start: int) -> bytes | None:
        """As Showing.piece."""
        return await _outside_the_loop(self._host.show, request, attempt, start)

    async def release(self, request: bytes, attempt: int, promised: bool) -> None:
        """As Showing."""
        if self._host.showing is not None:
            self._host.showing.release(request, attempt, promised=promised)

    async def ping(self) -> dict[str, Value]:
        """Alive, and how busy."""
        facts = self._host.facts()
        return facts and {"actor": ray.get_runtime_context().get_actor_name() or "", **facts}


def site_here() -> Site:
    """Where this process of a Ray cluster runs."""
    return Site(ray.get_runtime_context().get_node_id(), get_node_ip_address())


async def _outside_the_loop(work: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


StageActor: Any = ray.remote(max_restarts=0)(_StageProcess)  # Any: Ray's actor classes have no types
