"""Hashes what a stage received and sent, and signs for it, off the critical path.

A thread of its own works through steps in order, at most BEHIND of them late; then the stage waits. For every open
sequence it grows two trees, of the bytes as they came in and as they went out. A close says how many rows count, which
may be one less than ran, so the last row that drew is hashed only when it is known to count. A close makes it tell the
Head both roots; only when the Head says that all stages' roots match does it sign.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.messages.step import Fault, Reply, Roots, Signed, StepPlan
from serve_app.receipts.rows import Boundary, RowTree, ids_boundary
from serve_app.receipts.statement import StageStatement, StatementChain
from shard_tools import canonical
from shard_tools.cid import Cid

BEHIND = 2  # steps: what DESIGN 2.7 allows between a row leaving and its hash
_MAX_UNSIGNED = 4096  # closed sequences kept for a signature that never came (a Head that died)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageSpan:
    """Which part of which model a stage is, as its statements say it."""

    manifest: Cid
    stage: int
    n_stages: int
    start: int
    stop: int
    shards: tuple[Cid, ...]
    profile: str
    inlet: Boundary
    outlet: Boundary

    @classmethod
    def inlet_of(cls, manifest: Cid, start: int, outlet: Boundary) -> Boundary:
        """Where rows enter: token ids for the first stage, else hidden rows like those that leave."""
        return ids_boundary(manifest) if start == 0 else Boundary(manifest, start, outlet.dtype, outlet.width)


@dataclass(slots=True)
class _Trees:
    request_hash: bytes
    started_ms: int
    inlet: RowTree
    outlet: RowTree
    held: tuple[int, memoryview, memoryview] | None = None  # position, bytes in, bytes out of a row that may be void
    ended_ms: int = 0

    def append(self, start: int, received: memoryview, sent: memoryview) -> None:
        self.inlet.append(start, received)
        self.outlet.append(start, sent)

    def release(self, rows: int) -> None:
        """Hash the row held back, if it is one of the first `rows`."""
        if self.held is not None and self.held[0] < rows:
            self.append(*self.held)
        self.held = None


class Witness:
    """One stage's memory of what it has seen; speaks to the Head through `reply`."""

    def __init__(self, span: StageSpan, chain: StatementChain, reply: Callable[[Reply], None]) -> None:
        self._span, self._chain, self._reply = span, chain, reply
        self._work: queue.Queue[tuple[StepPlan, memoryview, memoryview, bool] | None] = queue.Queue(BEHIND)
        self._open: dict[int, _Trees] = {}
        self._closed: OrderedDict[int, _Trees] = OrderedDict()
        self.rows_hashed = 0  # of closed sequences; benchmarks compare it with the tokens processed
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def saw(self, plan: StepPlan, received: memoryview, sent: memoryview) -> None:
        """A step has run. The caller no longer writes to either buffer. Blocks while BEHIND steps wait."""
        self._work.put((plan, received, sent, False))

    def lost(self, plan: StepPlan) -> None:
        """A step failed: its rows will never be known, so nothing is signed for its sequences."""
        self._work.put((plan, memoryview(b""), memoryview(b""), True))

    def close(self) -> None:
        """Work off what is queued, then stop."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            plan, received, sent, lost = item
            try:
                if lost:
                    for seq in plan.spans["seq"].tolist():
                        self._open.pop(seq, None)
                else:
                    self._hash(plan, received, sent)
                self._end_and_sign(plan)
            except Exception as e:
                _log.exception("stage %d could not witness step %d", self._span.stage, plan.step)
                self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"hashing or signing failed: {e}"))

    def _hash(self, plan: StepPlan, received: memoryview, sent: memoryview) -> None:
        for item in plan.opens:
            inlet, outlet = RowTree(self._span.inlet), RowTree(self._span.outlet)
            self._open[int(item["seq"])] = _Trees(item["request"].tobytes(), _now_ms(), inlet, outlet)
        size_in, size_out, row = self._span.inlet.row_bytes, self._span.outlet.row_bytes, 0
        columns = (plan.spans[k].tolist() for k in ("seq", "start", "count", "sample"))
        for seq, start, count, sample in zip(*columns, strict=True):
            trees = self._open.get(seq)
            if trees is not None:  # else an earlier step of it was lost
                trees.release(start)
                rows_in = received[row * size_in : (row + count) * size_in]
                rows_out = sent[row * size_out : (row + count) * size_out]
                if count == 1 and sample:
                    trees.held = start, rows_in, rows_out
                else:
                    trees.append(start, rows_in, rows_out)
            row += count

    def _end_and_sign(self, plan: StepPlan) -> None:
        for seq, rows, seal in plan.closes.tolist():
            self._end(plan.epoch, seq, rows, bool(seal))
        for seq in plan.signs.tolist():
            self._sign(plan.epoch, seq)

    def _end(self, epoch: int, seq: int, rows: int, seal: bool) -> None:
        self._closed.pop(seq, None)
        trees = self._open.pop(seq, None)
        if trees is None:
            return
        trees.release(rows)
        self.rows_hashed += len(trees.outlet)
        if not seal:
            return
        trees.ended_ms = _now_ms()
        self._closed[seq] = trees
        if len(self._closed) > _MAX_UNSIGNED:
            self._closed.popitem(last=False)
        inlet, outlet = trees.inlet, trees.outlet
        self._reply(Roots(epoch, self._span.stage, seq, len(inlet), inlet.root(), outlet.root()))

    def _sign(self, epoch: int, seq: int) -> None:
        trees = self._closed.pop(seq)
        span = self._span
        statement = StageStatement(
            request_hash=trees.request_hash,
            attempt=0,
            stage=span.stage,
            n_stages=span.n_stages,
            start=span.start,
            stop=span.stop,
            manifest=span.manifest,
            shards=span.shards,
            profile=span.profile,
            in_root=trees.inlet.root(),
            out_root=trees.outlet.root(),
            n_rows=len(trees.inlet),
            started_ms=trees.started_ms,
            ended_ms=trees.ended_ms,
        )
        envelope = self._chain.sign(statement)
        self._reply(Signed(epoch, span.stage, seq, canonical.encode(envelope.to_value())))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
