"""A stage that obeys the controller of somebody else's pipeline, within what its own operator allows.

It is one stage of one pipeline at a time, with layers of models whose publishers its operator trusts, out of its own
store. When a neighbour is gone it gives its epoch up after a moment, keeps the layers, and may be taken again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve_app.choices import store_of
from serve_app.cluster.row_orders import PIECE_BYTES, HoldRows, ReleaseRows, RowOrder, ShowRows, piece_value
from serve_app.cluster.specs import GPU_KV_SHARE, StageSpec
from serve_app.cluster.stage_host import Site, StageHost, node_key_path
from serve_app.cluster.stage_orders import (
    STAGE_ITSELF,
    ComputesFastIn,
    Connect,
    Listen,
    Order,
    Ping,
    Ready,
    Take,
    Taken,
    TellTrouble,
    answer,
    decode_order,
    facts_value,
    gone_value,
    refusal,
)
from serve_app.engine.engine import DeviceName
from serve_app.errors import PipelineError
from serve_app.receipts.identity import NodeIdentity
from serve_app.transport.call import CallListener
from shard_tools.canonical import Value
from shard_tools.catalog import accept_record
from shard_tools.choice import Choice
from shard_tools.errors import LlmdError
from shard_tools.index.model_index import ModelRecord
from shard_tools.index.seen import SeenVersions
from shard_tools.signing import PublicKey, key_text
from shard_tools.trust import TrustPolicy

_log = logging.getLogger(__name__)
_CREDENTIALS_S = 3600  # each connection gets fresh ones
_WATCH_EVERY_S = 0.5
GIVE_UP_S = 5.0  # after a neighbour is gone: until then its controller may ask who it was
_PARTING_S = 0.3  # for the word of it to arrive
_CONNECT_S = 1800.0  # from take to connect: all others may load meanwhile


@dataclass(frozen=True, slots=True)
class StagePolicy:
    """What a stage's own operator decides, and no controller can change."""

    controllers: frozenset[PublicKey]  # whose orders it takes: nodes that one cluster's Supervisor may run on
    publishers: Callable[[], TrustPolicy]  # asked anew with each take: files of keys may change
    store: Path | Choice
    state_dir: Path
    engine: Choice
    device: DeviceName
    threads: int
    kv_memory_bytes: int  # not on cuda
    retain_bytes: int  # of rows, at most, where its controller wants them kept for audits
    layers: tuple[int, int] | None  # that it may be asked for; None: any
    edge_port: int  # 0: any


class StageServer:
    """One stage, and the door its controllers come by."""

    def __init__(self, policy: StagePolicy, host: str, give_up_s: float = GIVE_UP_S) -> None:
        """host: this one's address, for edges as for orders. give_up_s: for tests. Raises InputError, ConfigError."""
        self._policy, self._give_up_s = policy, give_up_s
        self._identity = NodeIdentity.load_or_create(node_key_path(policy.state_dir))
        self._host = StageHost(policy.store, policy.state_dir, Site("", host, policy.edge_port))
        self._blocks = store_of(policy.store)
        self._seen = SeenVersions(policy.state_dir / "seen")
        self._parting = asyncio.Event()
        self._changing = asyncio.Lock()  # held by whoever changes what this stage is
        self._held: _Held | None = None
        self._newest = -1  # epoch it was of
        self._obeyed: set[type[Order]] = set()  # since it was taken
        self._max_pages = 0

    @property
    def key(self) -> PublicKey:
        """By which its operator is known."""
        return self._identity.key

    async def serve(self, door: socket.socket) -> None:
        """Obey until this is cancelled; then neighbours see their edges close. door: listens."""
        listener = CallListener(self._credentials, self._policy.controllers, self.obey)
        watching = asyncio.create_task(self._watch())
        try:
            await listener.serve(door)
        finally:
            watching.cancel()
            self._leave()

    async def part(self) -> None:
        """Tell the controller that this stage will be gone for good: it need not be waited for."""
        self._parting.set()
        if self._held is not None:
            await asyncio.sleep(_PARTING_S)

    def _credentials(self) -> bytes:
        return self._identity.certify_tls(int(time.time()), _CREDENTIALS_S)

    async def obey(self, who: PublicKey, order: bytes) -> bytes:
        """The answer to an order of this controller, which has proved who it is."""
        try:
            return answer(await self._do(who, decode_order(order)))
        except LlmdError as e:
            _log.warning("an order was refused: %s", e)
            return refusal(str(e))
        except Exception as e:  # of torch, of the disk: the controller must learn of it as well
            _log.exception("an order could not be obeyed")
            return refusal(f"{type(e).__name__}: {e}")

    async def _do(self, who: PublicKey, order: Order) -> Value:
        match order:
            case Ready():
                return {}
            case Ping():
                return facts_value(self._host.facts()) if self._held is not None else {}
            case ComputesFastIn():
                return {"fast": await asyncio.to_thread(self._computes_fast_in, order)}
            case HoldRows() | ShowRows() | ReleaseRows():
                return await asyncio.to_thread(self._about_rows, order)
            case TellTrouble():
                return gone_value(await self._trouble(order.epoch) if self._is_of(order.epoch) else ())
        # A load cannot be cancelled, and nothing must begin beside it when its caller has left.
        return await asyncio.shield(self._change(who, order))

    async def _change(self, who: PublicKey, order: Take | Listen | Connect) -> Value:
        async with self._changing:
            if isinstance(order, Take):
                return await asyncio.to_thread(self._take, who, order)
            if not self._is_of(order.epoch):
                raise PipelineError(f"it is no stage of epoch {order.epoch} any more: take it first")
            if type(order) in self._obeyed:  # what the first one made would be lost, and live on
                raise PipelineError(f"epoch {order.epoch} has its {type(order).__name__.lower()} already")
            self._obeyed.add(type(order))
            if isinstance(order, Listen):
                found = await asyncio.to_thread(self._host.listen, order.awaited)
                return {"port": None if found is None else found.port}
            await asyncio.to_thread(self._connect, order)
            return {}

    async def _trouble(self, epoch: int) -> frozenset[str]:
        """Neighbours that are gone; or this stage itself, since its operator takes it away."""
        lost, parts = asyncio.ensure_future(self._host.trouble(epoch)), asyncio.ensure_future(self._parting.wait())
        try:
            await asyncio.wait((lost, parts), return_when=asyncio.FIRST_COMPLETED)
            return lost.result().gone if lost.done() else frozenset((STAGE_ITSELF,))
        finally:
            lost.cancel()
            parts.cancel()

    def _about_rows(self, order: RowOrder) -> Value:
        """Of rows that it has signed for, in whatever epoch: what was answered may be asked for after it left one."""
        showing = self._host.showing
        match order:
            case ShowRows():
                return piece_value(self._host.show(order.request, order.attempt, order.start, PIECE_BYTES))
            case HoldRows() if showing is not None:
                showing.retention.hold(order.request, order.attempt, promised=order.promised)
            case ReleaseRows() if showing is not None:
                showing.release(order.request, order.attempt, promised=order.promised)
        return {}

    def _computes_fast_in(self, order: ComputesFastIn) -> bool:
        from serve_app.engine.load import computes_fast_in  # torch: seconds

        return computes_fast_in(order.dtype, self._policy.device)

    def _take(self, who: PublicKey, order: Take) -> Value:
        """Raises LlmdError where the order is not one to obey, or cannot be."""
        policy = self._policy
        if self._parting.is_set():
            raise PipelineError("it leaves")
        if order.epoch <= self._newest:
            raise PipelineError(f"epoch {order.epoch} is not newer than {self._newest}, of which it was before")
        trusted = policy.publishers()
        record = ModelRecord(order.manifest, order.signature)
        model = accept_record(record, "the controller", self._blocks, trusted, int(time.time()), self._seen)
        first, end = policy.layers or (0, model.n_layers)
        if not first <= order.start < order.stop <= min(end, model.n_layers):
            raise PipelineError(
                f"layers [{order.start}, {order.stop}) were asked for, and of {model.name} it serves "
                f"[{first}, {min(end, model.n_layers)})"
            )
        spec = StageSpec(
            epoch=order.epoch,
            stage=order.stage,
            n_stages=order.n_stages,
            start=order.start,
            stop=order.stop,
            manifest=order.manifest,
            signature=order.signature,
            trusted=trusted,
            store=policy.store,
            engine=policy.engine,
            deterministic=order.deterministic,
            kv_dtype=order.kv_dtype,
            device=policy.device,
            page_size=order.page_size,
            threads=policy.threads,
            state_dir=policy.state_dir,
            session_lifetime_s=order.lifetime_s,
            retain_bytes=min(order.retain_bytes, policy.retain_bytes),
        )
        self._newest = order.epoch
        self._obeyed.clear()
        self._leave()
        report = self._host.take(spec, order.dtype)
        profile = report.profile
        on_gpu = profile.device.startswith("cuda")
        room = int(profile.memory_bytes * GPU_KV_SHARE) if on_gpu else policy.kv_memory_bytes
        self._max_pages = room // profile.kv_page_bytes
        if self._max_pages < 1:
            raise PipelineError(f"no room for a KV page of {profile.kv_page_bytes} bytes in {room}")
        self._held = _Held(order.epoch, time.monotonic())
        _log.info(
            "stage %d of %d, layers [%d, %d) of %s, in epoch %d of %s",
            order.stage,
            order.n_stages,
            order.start,
            order.stop,
            model.name,
            order.epoch,
            key_text(who),
        )
        load_ms = int(report.load_s * 1000)
        return Taken(profile, report.certificate, load_ms, report.opened_blocks, self._max_pages).to_value()

    def _connect(self, order: Connect) -> None:
        if order.n_pages > self._max_pages:
            raise PipelineError(f"{order.n_pages} KV pages were asked for, and it has room for {self._max_pages}")
        self._host.connect(order.head, order.after, order.n_pages, order.max_requests)

    def _is_of(self, epoch: int) -> bool:
        return self._held is not None and self._held.epoch == epoch

    def _leave(self) -> None:
        self._held = None
        try:
            self._host.leave()
        except PipelineError as e:
            _log.error("its layers are loaded anew when they are needed: %s", e)
            self._host.forget_layers()

    async def _watch(self) -> None:
        """Nobody's epoch is held for ever."""
        gone_since: float | None = None
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            held, now = self._held, time.monotonic()
            gone_since = None if held is None or not self._host.gone else gone_since or now
            forgotten = held is not None and not self._host.works and now - held.since > _CONNECT_S
            if held is None or not (forgotten or (gone_since is not None and now - gone_since > self._give_up_s)):
                continue
            async with self._changing:
                if self._held is held:
                    lost = ", ".join(sorted(self._host.gone)) or "its controller"
                    _log.warning("epoch %d is given up: %s is gone", held.epoch, lost)
                    await asyncio.to_thread(self._leave)
            gone_since = None


@dataclass(frozen=True, slots=True)
class _Held:
    """Of which epoch it is a stage."""

    epoch: int
    since: float  # monotonic
