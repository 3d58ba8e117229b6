"""The seam between the Supervisor and a stage: what it can ask of one, wherever that runs.

A stage of the cluster is a Ray actor (RayStage); one of another operator is reached over TLS (outside.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from serve_app.cluster.specs import StageReport, StageSpec, Trouble
from serve_app.cluster.wiring import Awaited, Joinable, Joint
from serve_app.engine.engine import ActivationDtype, BoxKind
from serve_app.transport.handshake import EdgeAddress
from shard_tools.canonical import Value
from shard_tools.signing import PublicKey


class StageHandle(Joinable, Protocol):
    """One stage. Methods as StageHost's. All raise RayError or PipelineError where it is gone; none bounds its time."""

    async def ready(self) -> None:
        """It is there."""

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool: ...

    async def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport: ...

    async def trouble(self, epoch: int) -> Trouble: ...

    async def ping(self) -> dict[str, Value]: ...


class RayStage:
    """An actor of this cluster. Implements StageHandle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @property
    def actor(self) -> Any:
        return self._actor

    def prepare(self, dtype: ActivationDtype) -> None:
        """Begin to load the layers of the stage it is likely to become. Not waited for: until it has, it is slower."""
        self._actor.prepare.remote(dtype)

    async def ready(self) -> None:
        await self._actor.ready.remote()

    async def node_key(self) -> PublicKey:
        """Of the node it runs on."""
        key: PublicKey = await self._actor.node_key.remote()
        return key

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool:
        return bool(await self._actor.computes_fast_in.remote(dtype))

    async def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        report: StageReport = await self._actor.take.remote(spec, dtype)
        return report

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        address: EdgeAddress | None = await self._actor.listen.remote(awaited)
        return address

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        await self._actor.connect.remote(head, after, n_pages, max_requests)

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        offer: bytes | None = await self._actor.offer_inbox.remote(kind, places)
        return offer

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        return bool(await self._actor.try_outbox.remote(kind, offer))

    async def got_probe(self, kind: BoxKind) -> bool:
        return bool(await self._actor.got_probe.remote(kind))

    async def use_outbox(self, kind: BoxKind) -> None:
        await self._actor.use_outbox.remote(kind)

    async def trouble(self, epoch: int) -> Trouble:
        trouble: Trouble = await self._actor.trouble.remote(epoch)
        return trouble

    async def ping(self) -> dict[str, Value]:
        facts: dict[str, Value] = await self._actor.ping.remote()
        return facts
