"""A process that is a stage: it loads its own layers by CID, then passes messages between its edges and its Stage.

It takes its place (`take`) in one epoch after another, as neighbours die and are replaced, with the layers it holds.
Knows nothing of Ray: as an actor of a cluster it stands in stage_actor.py. Its methods block unless they are async, and
are called one at a time, but for `trouble`, `facts` and `push`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.audit.showing import PIECE_BYTES
from serve_app.choices import store_of
from serve_app.cluster.showing import Showing
from serve_app.cluster.specs import StageReport, StageSpec, Trouble
from serve_app.cluster.wiring import Awaited, EdgeSet, Joint, Party
from serve_app.engine.engine import ActivationDtype, BoxKind, Engine, KvDtype, LendsRows
from serve_app.pipeline.deliveries import DeliveryTerms
from serve_app.pipeline.retention import Retention
from serve_app.pipeline.stage import Stage
from serve_app.pipeline.witness import StageSpan
from serve_app.receipts.identity import NodeIdentity, Session
from serve_app.receipts.rows import Boundary
from serve_app.receipts.statement import StatementChain
from serve_app.transport.handshake import EdgeAddress
from shard_tools.canonical import Value
from shard_tools.catalog import open_record
from shard_tools.choice import Choice
from shard_tools.cid import Cid, Codec
from shard_tools.index.model_index import ModelRecord
from shard_tools.manifest import Manifest
from shard_tools.signing import PublicKey
from shard_tools.store.block_store import BlockStore

TROUBLE_EVERY_S = 0.05  # how late it may be told
_STEP_ENDS_S = 5.0  # a step of 512 rows takes a second on two CPU cores
# How long a thread keeps the interpreter while another waits. A launch gives it up at every call to the GPU, some
# twenty times a step, and with Python's 5 ms would wait as often for the thread that counts rows.
SWITCH_INTERVAL_S = 1e-5


def node_key_path(state_dir: Path) -> Path:
    """Where a host keeps the key that is its identity."""
    return state_dir / "node.key"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a process runs, as its neighbours are to know it."""

    ray_node: str  # as Party's
    address: str
    port: int = 0  # for TCP edges; 0: any

    def party(self, name: str, node: PublicKey) -> Party:
        """This process, under this name."""
        return Party(name, node, os.getpid(), self.ray_node, self.address)


@dataclass(frozen=True, slots=True)
class _Held:
    """What an engine was loaded for."""

    manifest: Cid
    start: int
    stop: int
    dtype: ActivationDtype
    page_size: int
    deterministic: bool
    kv_dtype: KvDtype


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


class StageHost:
    """One stage at a time. The store, device, engine, threads and state_dir of every spec it takes are the same."""

    def __init__(self, store: Path | Choice, state_dir: Path, site: Site) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._site = site
        self._store = _CountingStore(store_of(store))
        self._identity = NodeIdentity.load_or_create(node_key_path(state_dir))
        self._spec: StageSpec | None = None  # until it takes a place
        self._dtype: ActivationDtype
        self._manifest: Manifest
        self._session: Session
        self._edges: EdgeSet | None = None
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        self._held: _Held | None = None
        self._room: tuple[int, int] | None = None  # that the engine has made: pages, requests
        self._load_s = 0.0
        self._past_host: list[Value] = []  # what this stage sends from GPU to GPU
        self._stage: Stage | None = None
        self._hashed: bool | None = None
        self._sender: PublicKey | None = None  # the node that signs for what comes in
        self.showing: Showing | None = None  # of the rows that it keeps, where its spec says so

    @property
    def key(self) -> PublicKey:
        """Of the node it runs on."""
        return self._identity.key

    def show(self, request: bytes, attempt: int, start: int, size: int = PIECE_BYTES) -> bytes | None:
        """As Showing.piece; None where no rows are kept."""
        if self.showing is None or self._spec is None:
            return None
        return self.showing.piece(request, attempt, start, self._spec.stage, self._session, size)

    def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        """Be this stage, in a new epoch: every request and neighbour is forgotten, layers that are here already stay.

        Raises what open_record and load_engine raise; PipelineError if a step under way does not end.
        """
        self.leave()
        self.hold(spec, dtype)
        assert self._engine is not None
        self._spec, self._dtype, self._sender = spec, dtype, None
        if spec.retain_bytes and self.showing is None:
            self.showing = Showing(Retention(spec.retain_bytes))
        elif not spec.retain_bytes:
            self.showing = None
        self._session = self._identity.open_session("stage", spec.epoch, int(time.time()), spec.session_lifetime_s)
        self._edges = EdgeSet(self._identity, spec.epoch, spec.session_lifetime_s, self._take_in, self._neighbour_lost)
        return StageReport(
            stage=spec.stage,
            party=self._site.party(f"stage {spec.stage}", self._session.node),
            host=socket.gethostname(),
            profile=self._engine.profile,
            certificate=self._session.certificate,
            load_s=self._load_s,
            opened_blocks=len(self._store.opened),
        )

    def hold(self, spec: StageSpec, dtype: ActivationDtype) -> None:
        """Have an engine of this stage's layers. Raises as `take`."""
        with self._loading:
            wanted = _Held(
                spec.manifest, spec.start, spec.stop, dtype, spec.page_size, spec.deterministic, spec.kv_dtype
            )
            if self._held != wanted:
                self.forget_layers()  # first: there is room for one
                self._load(spec, dtype)
                self._held = wanted

    def forget_layers(self) -> None:
        """What it takes next is loaded from its store."""
        self._engine = self._held = self._room = self._hashed = None

    def leave(self) -> None:
        """Let go of the pipeline of the epoch before; the layers stay. Raises PipelineError if a step does not end."""
        stage, lends, self._stage = self._stage, self._lends, None
        edges, self._edges = self._edges, None
        if edges is not None:
            edges.close()
        if stage is not None:
            if lends is not None:
                lends.release_boxes()
            stage.give_up(_STEP_ENDS_S)
            if lends is not None:
                lends.drop_boxes()
        self._past_host = []

    def _load(self, spec: StageSpec, dtype: ActivationDtype) -> None:
        # torch and transformers take seconds to import; the Supervisor and the ingresses, which import this
        # file for its class, have no use for them.
        from serve_app.engine.load import LoadOptions, load_engine

        began = time.perf_counter()
        self._manifest = open_record(ModelRecord(spec.manifest, spec.signature), self._store, spec.trusted)
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

    def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        """Let these neighbours open their edges to this stage. Raises PipelineError."""
        assert self._edges is not None, "listen before take"
        self._sender = next((a.peer.key for a in awaited if a.signed), None)
        return self._edges.listen(awaited, self._site.address, self._site.port)

    def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        """Open the edges to the Head and to the next stage (None for the last), and be ready for steps."""
        from serve_app.engine.load import shards_of

        spec = self._spec
        assert spec is not None and self._engine is not None and self._edges is not None, "connect before take"
        manifest = self._manifest
        if self._room not in (None, (n_pages, max_requests)):  # an engine makes room once, and this one was another's
            self.forget_layers()
            self.hold(spec, self._dtype)
        assert self._engine is not None
        if self._room is None:
            self._engine.reserve(n_pages, max_requests)
            self._room = n_pages, max_requests
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
            retention=self.showing.retention if self.showing else None,
            deliveries=DeliveryTerms(self._sender, after is not None and after.signed),
        )
        self._hashed = self._stage.hashed

    @property
    def _lends(self) -> LendsRows | None:
        """The engine, if rows can leave it past the host."""
        engine: object = self._engine
        return engine if isinstance(engine, LendsRows) else None

    def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        """As engine.LendsRows; None if this stage's engine is none."""
        lends = self._lends
        return lends.offer_inbox(kind, places) if lends is not None else None

    def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        """As engine.LendsRows."""
        lends = self._lends
        return lends is not None and lends.try_outbox(kind, offer)

    def got_probe(self, kind: BoxKind) -> bool:
        """As engine.LendsRows, after an offer."""
        lends = self._lends
        return lends is not None and lends.got_probe(kind)

    def use_outbox(self, kind: BoxKind) -> None:
        """As engine.LendsRows, after a successful try."""
        lends = self._lends
        assert lends is not None and self._stage is not None
        lends.use_outbox(kind)
        if kind == "rows":
            self._stage.hand_on_early()
        self._past_host.append(kind)

    def push(self, edge: str, number: int, message: bytes) -> None:
        """Take in message `number` of this edge of Ray calls."""
        if self._edges is not None:
            self._edges.push(edge, number, message)

    @property
    def works(self) -> bool:
        """Whether it has its edges."""
        return self._stage is not None

    @property
    def gone(self) -> frozenset[str]:
        """Neighbours of this epoch that it has lost."""
        edges = self._edges
        return frozenset(() if edges is None else edges.gone)

    async def trouble(self, epoch: int) -> Trouble:
        """Ends when a neighbour of this epoch is gone, and says which; or when another epoch has begun."""
        while self._edges is not None and self._is_of(epoch) and not self.gone:
            await asyncio.sleep(TROUBLE_EVERY_S)
        gone = self.gone if self._is_of(epoch) else frozenset()
        me = "a stage" if self._spec is None else f"stage {self._spec.stage}"
        return Trouble(f"{me} has lost {', '.join(sorted(gone))}", gone)

    def _is_of(self, epoch: int) -> bool:
        return self._spec is not None and self._spec.epoch == epoch

    def facts(self) -> dict[str, Value]:
        """What it is and how busy; empty until it is something."""
        stage, spec = self._stage, self._spec
        if self._engine is None or spec is None:
            return {}
        overdue = stage.progress.overdue() if stage else None
        return {
            "stage": spec.stage,
            "layers": [spec.start, spec.stop],
            "host": socket.gethostname(),
            "device": self._engine.profile.device,
            "dtype": self._engine.profile.dtype,
            "profile": self._engine.profile.description[:200],
            "parameter_bytes": self._engine.profile.parameter_bytes,
            "load_ms": int(self._load_s * 1000),
            "node": self._session.node.hex()[:16],
            "steps": stage.steps if stage else 0,
            "past_host": list(self._past_host),
            "busy_ms": int(stage.busy_s * 1000) if stage else 0,
            "pace": stage.pace.to_value() if stage else None,
            "overdue": overdue.to_value() if overdue else None,
            "rows_hashed": stage.witness.rows_hashed if stage else 0,
            "rows_reused": stage.witness.rows_reused if stage else 0,
            "rows_abandoned": stage.witness.rows_abandoned if stage else 0,
            "deliveries_signed": stage.deliveries.signed if stage and stage.deliveries else 0,
            "deliveries_checked": stage.deliveries.checked if stage and stage.deliveries else 0,
            "retains": stage is not None and stage.retention is not None,
            "retain_bytes": spec.retain_bytes,
            "retained_bytes": self.showing.retention.bytes if self.showing else 0,
            "unauditable": self.showing.retention.unauditable if self.showing else 0,
        }

    def _take_in(self, message: bytes) -> None:
        stage = self._stage
        assert stage is not None, "a message before connect"
        stage.deliver(message)

    def _neighbour_lost(self, peer: str, why: str) -> None:
        if self._stage is not None:
            self._stage.lost(peer, why)
