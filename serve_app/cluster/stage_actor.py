"""A stage as a Ray actor: loads its own layers by CID, then passes messages between its edges and its Stage.

It takes its place (`take`) in one epoch after another, as neighbours die and are replaced, with the layers it holds.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util import get_node_ip_address

from serve_app.choices import store_of
from serve_app.cluster.showing import Showing
from serve_app.cluster.specs import StageReport, StageSpec, Trouble
from serve_app.cluster.wiring import Awaited, EdgeSet, Joint, Party
from serve_app.engine.engine import ActivationDtype, BoxKind, Engine, LendsRows
from serve_app.pipeline.retention import Retention
from serve_app.pipeline.stage import Stage
from serve_app.pipeline.witness import StageSpan
from serve_app.receipts.identity import NodeIdentity, Session
from serve_app.receipts.rows import Boundary
from serve_app.receipts.statement import StatementChain
from serve_app.transport.handshake import EdgeAddress
from shard_tools.canonical import Value
from shard_tools.catalog import open_record
from shard_tools.cid import Cid, Codec
from shard_tools.index.model_index import ModelRecord
from shard_tools.signing import PublicKey
from shard_tools.store.block_store import BlockStore

T = TypeVar("T")
TROUBLE_EVERY_S = 0.05  # how late it may be told
_STEP_ENDS_S = 5.0  # a step of 512 rows takes a second on two CPU cores
# How long a thread keeps the interpreter while another waits. A launch gives it up at every call to the GPU, some
# twenty times a step, and with Python's 5 ms would wait as often for the thread that counts rows.
SWITCH_INTERVAL_S = 1e-5


def node_key_path(state_dir: Path) -> Path:
    """Where a host keeps the key that is its identity."""
    return state_dir / "node.key"


class _CountingStore:
    """The node's store, which remembers what was opened: a stage shows that it read only its own layers."""

    def __init__(self, inner: BlockStore) -> None:
        self._inner = inner
        self.opened: set[Cid] = set()

    @property
    def label(self) -> str:
        return self._inner.label

    def put(self, codec: Codec, block: bytes) -> Cid:
        return self._inner.put(codec, block)

    def get(self, cid: Cid) -> bytes:
        self.opened.add(cid)
        return self._inner.get(cid)

    def has(self, cid: Cid) -> bool:
        return self._inner.has(cid)

    def delete(self, cid: Cid) -> None:
        self._inner.delete(cid)

    def cids(self) -> Iterator[Cid]:
        return self._inner.cids()


class _StageProcess:
    """Async: pings and pushes are answered while the Stage's own thread computes."""

    def __init__(self, spec: StageSpec) -> None:
        """spec: what it may become; `take` says what it is."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._spec = spec
        self._store = _CountingStore(store_of(spec.store))
        record = ModelRecord(spec.manifest, spec.signature)
        self._manifest = open_record(record, self._store, spec.trusted)
        self._identity = NodeIdentity.load_or_create(node_key_path(spec.state_dir))
        self._session: Session
        self._edges: EdgeSet | None = None
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        self._loaded: tuple[int, int, ActivationDtype] | None = None
        self._room: tuple[int, int] | None = None  # that the engine has made: pages, requests
        self._load_s = 0.0
        self._past_host: list[Value] = []  # what this stage sends from GPU to GPU
        self._stage: Stage | None = None
        self._hashed: bool | None = None
        self._showing = Showing(Retention(spec.retain_bytes)) if spec.retain_bytes else None

    async def ready(self) -> None:
        """The process runs."""

    async def prepare(self, dtype: ActivationDtype) -> None:
        """Load the layers of the stage it is likely to become, so that `take` need not."""
        await _outside_the_loop(self._hold, self._spec, dtype)

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool:
        """Whether this host has instructions for it: all stages must compute in one dtype."""
        # torch and transformers take seconds to import; the Supervisor and the ingresses, which import this
        # file for its class, have no use for them.
        from serve_app.engine.load import computes_fast_in

        return computes_fast_in(dtype, self._spec.device)

    async def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        """Be this stage, in a new epoch: every request and neighbour is forgotten, layers that are here already stay.

        Raises what load_engine raises; PipelineError if a step under way does not end.
        """
        return await _outside_the_loop(self._take_place, spec, dtype)

    def _take_place(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        self._leave()
        self._hold(spec, dtype)
        assert self._engine is not None
        self._spec = spec
        self._session = self._identity.open_session("stage", spec.epoch, int(time.time()), spec.session_lifetime_s)
        self._edges = EdgeSet(self._identity, spec.epoch, spec.session_lifetime_s, self._take, self._neighbour_lost)
        return StageReport(
            stage=spec.stage,
            party=party_here(f"stage {spec.stage}", self._session.node),
            host=socket.gethostname(),
            profile=self._engine.profile,
            certificate=self._session.certificate,
            load_s=self._load_s,
            opened_blocks=len(self._store.opened),
        )

    def _hold(self, spec: StageSpec, dtype: ActivationDtype) -> None:
        """Have an engine of this stage's layers."""
        with self._loading:
            wanted = (spec.start, spec.stop, dtype)
            if self._loaded != wanted:
                self._engine = self._loaded = self._room = self._hashed = None  # first: there is room for one
                self._load(spec, dtype)
                self._loaded = wanted

    def _leave(self) -> None:
        """The pipeline of the epoch before."""
        stage, lends, self._stage = self._stage, self._lends, None
        if self._edges is not None:
            self._edges.close()
        if stage is not None:
            if lends is not None:
                lends.release_boxes()
            stage.give_up(_STEP_ENDS_S)
            if lends is not None:
                lends.drop_boxes()
        self._past_host = []

    def _load(self, spec: StageSpec, dtype: ActivationDtype) -> None:
        from serve_app.engine.load import LoadOptions, load_engine

        began = time.perf_counter()
        self._store.opened.clear()
        options = LoadOptions(
            spec.device,
            dtype,
            spec.page_size,
            spec.threads,
            spec.engine,
            spec.deterministic,
            kv_dtype=spec.kv_dtype,
        )
        self._engine = load_engine(self._store, self._manifest, spec.start, spec.stop, options)
        self._load_s = time.perf_counter() - began

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        """Let these neighbours open their edges to this stage."""
        assert self._edges is not None, "listen before take"
        return await _outside_the_loop(self._edges.listen, awaited, get_node_ip_address())

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        """Open the edges to the Head and to the next stage (None for the last), and be ready for steps."""
        await _outside_the_loop(self._connect, head, after, n_pages, max_requests)

    def _connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        from serve_app.engine.load import shards_of

        spec, manifest = self._spec, self._manifest
        assert self._engine is not None and self._edges is not None, "connect before take"
        if self._room is None:
            self._engine.reserve(n_pages, max_requests)
            self._room = n_pages, max_requests
        assert self._room == (n_pages, max_requests), "an engine makes room once"
        outlet = Boundary(manifest.cid, spec.stop, self._engine.profile.dtype, manifest.hidden_size)
        span = StageSpan(
            manifest=manifest.cid,
            stage=spec.stage,
            n_stages=spec.n_stages,
            start=spec.start,
            stop=spec.stop,
            shards=shards_of(manifest, spec.start, spec.stop),
            profile=self._engine.profile.description[:200],
            inlet=StageSpan.inlet_of(manifest.cid, spec.start, outlet),
            outlet=outlet,
        )
        self._stage = Stage(
            self._engine,
            span,
            StatementChain(self._session),
            page_size=spec.page_size,
            next=self._edges.open(after) if after is not None else None,
            head=self._edges.open(head),
            epoch=spec.epoch,
            hashed=self._hashed,
            retention=self._showing.retention if self._showing else None,
        )
        self._hashed = self._stage.hashed

    @property
    def _lends(self) -> LendsRows | None:
        """The engine, if rows can leave it past the host."""
        engine: object = self._engine
        return engine if isinstance(engine, LendsRows) else None

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        """As engine.LendsRows; None if this stage's engine is none."""
        lends = self._lends
        return await _outside_the_loop(lends.offer_inbox, kind, places) if lends is not None else None

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        """As engine.LendsRows."""
        lends = self._lends
        return lends is not None and await _outside_the_loop(lends.try_outbox, kind, offer)

    async def got_probe(self, kind: BoxKind) -> bool:
        """As engine.LendsRows, after an offer."""
        lends = self._lends
        return lends is not None and await _outside_the_loop(lends.got_probe, kind)

    async def use_outbox(self, kind: BoxKind) -> None:
        """As engine.LendsRows, after a successful try."""
        lends = self._lends
        assert lends is not None and self._stage is not None
        lends.use_outbox(kind)
        if kind == "rows":
            self._stage.hand_on_early()
        self._past_host.append(kind)

    async def push(self, edge: str, number: int, message: bytes) -> None:
        """Take in message `number` of this edge of Ray calls."""
        if self._edges is not None:
            self._edges.push(edge, number, message)

    async def trouble(self, epoch: int) -> Trouble:
        """Ends when a neighbour of this epoch is gone, and says which; or when another epoch has begun."""
        while (edges := self._edges) is not None and self._spec.epoch == epoch and not edges.gone:
            await asyncio.sleep(TROUBLE_EVERY_S)
        gone = frozenset(edges.gone if edges is not None and self._spec.epoch == epoch else ())
        return Trouble(f"stage {self._spec.stage} has lost {', '.join(sorted(gone))}", gone)

    async def node_key(self) -> PublicKey:
        """Of the node it runs on."""
        return self._identity.key

    async def hold(self, request: bytes, attempt: int, promised: bool) -> None:
        """As Retention; nothing happens where no rows are kept."""
        if self._showing is not None:
            self._showing.retention.hold(request, attempt, promised=promised)

    async def show(self, request: bytes, attempt: int, start: int) -> bytes | None:
        """As Showing.piece."""
        showing, stage = self._showing, self._spec.stage
        if showing is None:
            return None
        return await _outside_the_loop(showing.piece, request, attempt, start, stage, self._session)

    async def release(self, request: bytes, attempt: int) -> None:
        """As Showing."""
        if self._showing is not None:
            self._showing.release(request, attempt)

    async def ping(self) -> dict[str, Value]:
        """Alive, and how busy."""
        stage = self._stage
        if self._engine is None:
            return {}
        return {
            "stage": self._spec.stage,
            "actor": ray.get_runtime_context().get_actor_name() or "",
            "layers": [self._spec.start, self._spec.stop],
            "host": socket.gethostname(),
            "device": self._engine.profile.device,
            "dtype": self._engine.profile.dtype,
            "parameter_bytes": self._engine.profile.parameter_bytes,
            "load_ms": int(self._load_s * 1000),
            "node": self._session.node.hex()[:16],
            "steps": stage.steps if stage else 0,
            "past_host": list(self._past_host),
            "busy_ms": int(stage.busy_s * 1000) if stage else 0,
            "rows_hashed": stage.witness.rows_hashed if stage else 0,
            "rows_reused": stage.witness.rows_reused if stage else 0,
            "rows_abandoned": stage.witness.rows_abandoned if stage else 0,
            "retains": stage is not None and stage.retention is not None,
            "retained_bytes": self._showing.retention.bytes if self._showing else 0,
            "unauditable": self._showing.retention.unauditable if self._showing else 0,
        }

    def _take(self, message: bytes) -> None:
        stage = self._stage
        assert stage is not None, "a message before connect"
        stage.deliver(message)

    def _neighbour_lost(self, peer: str, why: str) -> None:
        if self._stage is not None:
            self._stage.lost(peer, why)


def party_here(name: str, node: PublicKey) -> Party:
    """This process, as its neighbours are to know it."""
    return Party(name, node, os.getpid(), ray.get_runtime_context().get_node_id(), get_node_ip_address())


async def _outside_the_loop(work: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


StageActor: Any = ray.remote(max_restarts=0)(_StageProcess)  # Any: Ray's actor classes have no types
