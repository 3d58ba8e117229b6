"""A stage as a Ray actor: loads its own layers by CID, then passes messages between its edges and its Stage."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util import get_node_ip_address

from serve_app.choices import store_of
from serve_app.cluster.specs import StageReport, StageSpec
from serve_app.cluster.wiring import Awaited, EdgeSet, Joint, Party
from serve_app.engine.engine import ActivationDtype, BoxKind, Engine, LendsRows
from serve_app.pipeline.stage import Stage
from serve_app.pipeline.witness import StageSpan
from serve_app.receipts.identity import NodeIdentity
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
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._spec = spec
        self._store = _CountingStore(store_of(spec.store))
        record = ModelRecord(spec.manifest, spec.signature)
        self._manifest = open_record(record, self._store, spec.trusted)
        identity = NodeIdentity.load_or_create(node_key_path(spec.state_dir))
        self._session = identity.open_session("stage", spec.epoch, int(time.time()), spec.session_lifetime_s)
        self._edges = EdgeSet(identity, spec.epoch, spec.session_lifetime_s, self._take, self._neighbour_lost)
        self._engine: Engine
        self._load_s = 0.0
        self._past_host: list[Value] = []  # what this stage sends from GPU to GPU
        self._stage: Stage | None = None

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool:
        """Whether this host has instructions for it: all stages must compute in one dtype."""
        # torch and transformers take seconds to import; the Supervisor and the ingresses, which import this
        # file for its class, have no use for them.
        from serve_app.engine.load import computes_fast_in

        return computes_fast_in(dtype, self._spec.device)

    async def load(self, dtype: ActivationDtype) -> StageReport:
        """Load this stage's layers and say what came of it. Raises what load_engine raises."""
        return await _outside_the_loop(self._load, dtype)

    def _load(self, dtype: ActivationDtype) -> StageReport:
        from serve_app.engine.load import LoadOptions, load_engine

        began, spec = time.perf_counter(), self._spec
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
        return StageReport(
            stage=spec.stage,
            party=party_here(f"stage {spec.stage}", self._session.node),
            host=socket.gethostname(),
            profile=self._engine.profile,
            certificate=self._session.certificate,
            load_s=self._load_s,
            opened_blocks=len(self._store.opened),
        )

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        """Let these neighbours open their edges to this stage."""
        return await _outside_the_loop(self._edges.listen, awaited, get_node_ip_address())

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        """Open the edges to the Head and to the next stage (None for the last), and be ready for steps."""
        await _outside_the_loop(self._connect, head, after, n_pages, max_requests)

    def _connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        from serve_app.engine.load import shards_of

        spec, manifest = self._spec, self._manifest
        self._engine.reserve(n_pages, max_requests)
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
        )

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        """As engine.LendsRows; None if this stage's engine is none."""
        engine = self._engine
        return await _outside_the_loop(engine.offer_inbox, kind, places) if isinstance(engine, LendsRows) else None

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        """As engine.LendsRows."""
        engine = self._engine
        return isinstance(engine, LendsRows) and await _outside_the_loop(engine.try_outbox, kind, offer)

    async def got_probe(self, kind: BoxKind) -> bool:
        """As engine.LendsRows, after an offer."""
        engine = self._engine
        return isinstance(engine, LendsRows) and await _outside_the_loop(engine.got_probe, kind)

    async def use_outbox(self, kind: BoxKind) -> None:
        """As engine.LendsRows, after a successful try."""
        assert isinstance(self._engine, LendsRows) and self._stage is not None
        self._engine.use_outbox(kind)
        if kind == "rows":
            self._stage.hand_on_early()
        self._past_host.append(kind)

    async def push(self, edge: str, number: int, message: bytes) -> None:
        """Take in message `number` of this edge of Ray calls."""
        self._edges.push(edge, number, message)

    async def ping(self) -> dict[str, Value]:
        """Alive, and how busy."""
        stage = self._stage
        return {
            "stage": self._spec.stage,
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
        }

    def _take(self, message: bytes) -> None:
        assert self._stage is not None, "a message before connect"
        self._stage.deliver(message)

    def _neighbour_lost(self, peer: str, why: str) -> None:
        if self._stage is not None:
            self._stage.lost(peer, why)


def party_here(name: str, node: PublicKey) -> Party:
    """This process, as its neighbours are to know it."""
    return Party(name, node, os.getpid(), ray.get_runtime_context().get_node_id(), get_node_ip_address())


async def _outside_the_loop(work: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


StageActor: Any = ray.remote(max_restarts=0)(_StageProcess)  # Any: Ray's actor classes have no types
