"""Hashes what a stage received and sent, and signs for it, off the critical path.

A thread of its own works through steps in order, at most BEHIND of them late; then the stage waits. For every open
sequence it grows two trees, of the bytes as they came in and as they went out. A close says how many rows count, which
may be some less than ran, so the last rows that drew join the trees only when they are known to count. A close makes it
tell the Head both roots; only when the Head says that all stages' roots match does it sign.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_app.engine.engine import StepOutput
from serve_app.messages.step import ABANDON, SEAL, Fault, Reply, Roots, Signed, StepPlan
from serve_app.receipts.rows import PAGE_ROWS, Boundary, RowTree, ids_boundary, leaves_of
from serve_app.receipts.statement import StageStatement, StatementChain
from shard_tools import canonical
from shard_tools.cid import Cid

MAX_VOID = 4  # rows of a sequence that may run before it is known that it has ended: a Head looks two ahead
_RING = 2 * PAGE_ROWS
BEHIND = 2  # steps: what DESIGN 2.7 allows between a row leaving and its hash
_MAX_UNSIGNED = 4096  # closed sequences kept for a signature that never came (a Head that died)
_log = logging.getLogger(__name__)

Leaves = npt.NDArray[np.uint8]


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
    attempt: int
    started_ms: int
    inlet: RowTree
    outlet: RowTree
    slot: int  # of the leaves that wait
    ended_ms: int = 0


class Witness:
    """One stage's memory of what it has seen; speaks to the Head through `reply`."""

    def __init__(
        self, span: StageSpan, chain: StatementChain, reply: Callable[[Reply], None], hashed: bool = False
    ) -> None:
        """hashed: steps come with the engine's own digests of their rows."""
        self._span, self._chain, self._reply, self._hashed = span, chain, reply, hashed
        self._work: queue.Queue[tuple[StepPlan, StepOutput | None] | None] = queue.Queue(BEHIND)
        self._open: dict[int, _Trees] = {}
        # Leaves of rows that may turn out void, by slot, in or out, and position % _RING.
        self._waiting = np.zeros((64, 2, _RING, 32), np.uint8)
        self._seen = np.zeros(64, np.int64)  # rows of the sequence in each slot
        self._free = list(range(63, -1, -1))
        self._closed: OrderedDict[int, _Trees] = OrderedDict()
        self.rows_hashed = 0  # of closed sequences; benchmarks compare it with the tokens processed
        self.rows_abandoned = 0  # of attempts that were given up; not among those hashed
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
                        self._forget(seq)
                else:
                    self._hash(plan, output)
                self._end_and_sign(plan)
            except Exception as e:
                _log.exception("stage %d could not witness step %d", self._span.stage, plan.step)
                self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"hashing or signing failed: {e}"))

    def _hash(self, plan: StepPlan, output: StepOutput) -> None:
        for item in plan.opens:
            inlet, outlet = RowTree(self._span.inlet), RowTree(self._span.outlet)
            slot = self._free.pop() if self._free else self._lengthen()
            self._seen[slot] = 0
            self._open[int(item["seq"])] = _Trees(
                item["request"].tobytes(), int(item["attempt"]), _now_ms(), inlet, outlet, slot
            )
        if plan.rows == 0:
            return
        leaves_in, leaves_out = self._leaves(plan, output)
        starts, counts = plan.spans["start"].astype(np.int64), plan.spans["count"].astype(np.int64)
        first = np.cumsum(counts) - counts
        seqs = plan.spans["seq"].tolist()
        trees = [self._open.get(seq) for seq in seqs]  # None: an earlier step of it was lost
        may_be_void = (counts == 1) & (plan.spans["sample"] != 0)
        for i in np.flatnonzero(~may_be_void).tolist():
            own, rows = trees[i], slice(int(first[i]), int(first[i] + counts[i]))
            if own is not None:
                self._release(own, int(starts[i]))
                self._seen[own.slot] = starts[i] + counts[i]
                own.inlet.append_leaves(int(starts[i]), leaves_in[rows].tobytes())
                own.outlet.append_leaves(int(starts[i]), leaves_out[rows].tobytes())
        # One assignment for all rows that wait, and a turn of Python only for the one in sixteen that fills its page.
        kept = np.array([i for i in np.flatnonzero(may_be_void).tolist() if trees[i] is not None], np.int64)
        slots = np.array([trees[i].slot for i in kept], np.int64)
        assert (self._seen[slots] == starts[kept]).all(), "rows with a gap"
        self._seen[slots] = starts[kept] + 1
        places, rows_kept = starts[kept] % _RING, first[kept]
        self._waiting[slots, 0, places] = leaves_in[rows_kept]
        self._waiting[slots, 1, places] = leaves_out[rows_kept]
        for i in kept[starts[kept] % PAGE_ROWS == MAX_VOID - 1].tolist():
            self._release(trees[i], int(starts[i]) + 1 - MAX_VOID)

    def _leaves(self, plan: StepPlan, output: StepOutput) -> tuple[Leaves, Leaves]:
        """Leaves of the rows that came in and of those that went out, [rows, 32]."""
        if self._hashed:
            assert output.digests is not None
            both = output.digests.wait()
        else:
            spans = [(start, count) for start, count in plan.spans[["start", "count"]].tolist()]
            both = (
                memoryview(leaves_of(self._span.inlet, spans, output.received)),
                memoryview(leaves_of(self._span.outlet, spans, output.hidden)),
            )
        inlet, outlet = (np.frombuffer(part, np.uint8).reshape(-1, 32) for part in both)
        return inlet, outlet

    def _release(self, trees: _Trees, rows: int) -> None:
        """Of the leaves that wait, those among the first `rows` of the sequence count."""
        start = len(trees.inlet)
        if rows > start:
            places = np.arange(start, rows) % _RING
            inlet, outlet = self._waiting[trees.slot][:, places]
            trees.inlet.append_leaves(start, inlet.tobytes())
            trees.outlet.append_leaves(start, outlet.tobytes())

    def _lengthen(self) -> int:
        """Room for more sequences; a slot of it."""
        old = len(self._waiting)
        self._waiting = np.concatenate([self._waiting, np.zeros_like(self._waiting)])
        self._seen = np.concatenate([self._seen, np.zeros_like(self._seen)])
        self._free += range(2 * old - 1, old, -1)
        return old

    def _end_and_sign(self, plan: StepPlan) -> None:
        for seq, rows, seal in plan.closes.tolist():
            self._end(plan.epoch, seq, rows, seal)
        for seq in plan.signs.tolist():
            self._sign(plan.epoch, seq)

    def _end(self, epoch: int, seq: int, rows: int, seal: int) -> None:
        self._closed.pop(seq, None)
        trees = self._forget(seq)
        if trees is None:
            return
        seen = int(self._seen[trees.slot])
        if seal == ABANDON:
            self.rows_abandoned += seen
            return
        self._release(trees, min(rows, seen))
        self.rows_hashed += len(trees.outlet)
        if seal != SEAL:
            return
        trees.ended_ms = _now_ms()
        self._closed[seq] = trees
        if len(self._closed) > _MAX_UNSIGNED:
            self._closed.popitem(last=False)
        inlet, outlet = trees.inlet, trees.outlet
        self._reply(Roots(epoch, self._span.stage, seq, len(inlet), inlet.root(), outlet.root()))

    def _forget(self, seq: int) -> _Trees | None:
        """What is known of an open sequence; its slot is another's from now on."""
        trees = self._open.pop(seq, None)
        if trees is not None:
            self._free.append(trees.slot)
        return trees

    def _sign(self, epoch: int, seq: int) -> None:
        trees = self._closed.pop(seq)
        span = self._span
        statement = StageStatement(
            request_hash=trees.request_hash,
            attempt=trees.attempt,
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
