"""Hashes what a stage received and sent, and signs for it, off the critical path.

A thread of its own works through steps in order, at most BEHIND of them late; then the stage waits. For every open
sequence it grows two trees, of the bytes as they came in and as they went out. A close says how many rows count, which
may be some less than ran, so the last rows that drew are hashed only when they are known to count. A close makes it
tell the Head both roots; only when the Head says that all stages' roots match does it sign.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.engine.engine import StepOutput
from serve_app.messages.step import Fault, Reply, Roots, Signed, StepPlan
from serve_app.receipts.rows import Boundary, RowTree, ids_boundary
from serve_app.receipts.statement import StageStatement, StatementChain
from shard_tools import canonical
from shard_tools.cid import Cid

MAX_VOID = 4  # rows of a sequence that may run before it is known that it has ended: a Head looks two ahead
_HELD = 16 + MAX_VOID
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
    hashed: bool  # rows come as their leaves
    held: list[tuple[memoryview, memoryview]] = field(default_factory=list)  # of the last rows: in and out
    ended_ms: int = 0

    def append(self, received: memoryview | bytes, sent: memoryview | bytes) -> None:
        """Rows that count."""
        for tree, rows in ((self.inlet, received), (self.outlet, sent)):
            (tree.append_leaves if self.hashed else tree.append)(len(tree), rows)

    def hold(self, position: int, received: memoryview, sent: memoryview) -> None:
        """A row that may turn out void. Older ones are hashed many at a time: each call has its price."""
        held = self.held
        if not held:
            assert position == len(self.inlet), "rows with a gap"
        held.append((received, sent))
        if len(held) >= _HELD:
            self.release(position + 1 - MAX_VOID)

    def release(self, rows: int) -> None:
        """Of the rows held, those that are among the first `rows` of the sequence count."""
        n = min(max(rows - len(self.inlet), 0), len(self.held))
        if n:
            self.append(*(b"".join(part) for part in zip(*self.held[:n], strict=True)))
            del self.held[:n]


class Witness:
    """One stage's memory of what it has seen; speaks to the Head through `reply`."""

    def __init__(
        self, span: StageSpan, chain: StatementChain, reply: Callable[[Reply], None], hashed: bool = False
    ) -> None:
        """hashed: steps come with the engine's own digests of their rows."""
        self._span, self._chain, self._reply, self._hashed = span, chain, reply, hashed
        self._work: queue.Queue[tuple[StepPlan, StepOutput | None] | None] = queue.Queue(BEHIND)
        self._open: dict[int, _Trees] = {}
        self._closed: OrderedDict[int, _Trees] = OrderedDict()
        self.rows_hashed = 0  # of closed sequences; benchmarks compare it with the tokens processed
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def saw(self, plan: StepPlan, output: StepOutput) -> None:
        """A step has run. Blocks while BEHIND steps wait."""
        self._work.put((plan, output))

    def lost(self, plan: StepPlan) -> None:
        """A step failed: its rows will never be known, so nothing is signed for its sequences."""
        self._work.put((plan, None))

    def close(self) -> None:
        """Work off what is queued, then stop."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            plan, output = item
            try:
                if output is None:
                    for seq in plan.spans["seq"].tolist():
                        self._open.pop(seq, None)
                else:
                    self._hash(plan, output)
                self._end_and_sign(plan)
            except Exception as e:
                _log.exception("stage %d could not witness step %d", self._span.stage, plan.step)
                self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"hashing or signing failed: {e}"))

    def _hash(self, plan: StepPlan, output: StepOutput) -> None:
        for item in plan.opens:
            inlet, outlet = RowTree(self._span.inlet), RowTree(self._span.outlet)
            self._open[int(item["seq"])] = _Trees(item["request"].tobytes(), _now_ms(), inlet, outlet, self._hashed)
        if self._hashed and plan.rows:
            assert output.digests is not None
            (received, sent), size_in, size_out = output.digests.wait(), 32, 32
        else:
            received, sent = output.received, output.hidden
            size_in, size_out = self._span.inlet.row_bytes, self._span.outlet.row_bytes
        row = 0
        columns = (plan.spans[k].tolist() for k in ("seq", "start", "count", "sample"))
        for seq, start, count, sample in zip(*columns, strict=True):
            trees = self._open.get(seq)
            if trees is not None:  # else an earlier step of it was lost
                rows_in = received[row * size_in : (row + count) * size_in]
                rows_out = sent[row * size_out : (row + count) * size_out]
                if count == 1 and sample:
                    trees.hold(start, rows_in, rows_out)
                else:
                    trees.release(start)
                    trees.append(rows_in, rows_out)
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
