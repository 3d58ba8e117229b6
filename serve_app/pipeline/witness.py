"""Hashes what a stage received and sent, and signs for it, off the critical path.

A thread of its own works through steps in order, at most BEHIND of them late; then the stage waits. For every open
sequence it grows two trees, of the bytes as they came in and as they went out. A close makes it tell
the Head both roots; only when the Head says that all stages' roots match does it sign.
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
    ended_ms: int = 0


class Witness:
    """One stage's memory of what it has seen; speaks to the Head through `reply`."""

    def __init__(self, span: StageSpan, chain: StatementChain, reply: Callable[[Reply], None]) -> None:
        self._span, self._chain, self._reply = span, chain, reply
        self._work: queue.Queue[tuple[StepPlan, memoryview, memoryview] | None] = queue.Queue(BEHIND)
        self._open: dict[int, _Trees] = {}
        self._closed: OrderedDict[int, _Trees] = OrderedDict()
        self.rows_hashed = 0  # benchmarks compare it with the tokens processed
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def saw(self, plan: StepPlan, received: memoryview, sent: memoryview) -> None:
        """A step has run. The caller no longer writes to either buffer. Blocks while BEHIND steps wait."""
        self._work.put((plan, received, sent))

    def close(self) -> None:
        """Work off what is queued, then stop."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            plan, received, sent = item
            try:
                self._witness(plan, received, sent)
            except Exception as e:
                _log.exception("stage %d could not witness step %d", self._span.stage, plan.step)
                self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"hashing or signing failed: {e}"))

    def _witness(self, plan: StepPlan, received: memoryview, sent: memoryview) -> None:
        for item in plan.opens:
            trees = _Trees(item["request"].tobytes(), _now_ms(), RowTree(self._span.inlet), RowTree(self._span.outlet))
            self._open[int(item["seq"])] = trees
        size_in, size_out, row = self._span.inlet.row_bytes, self._span.outlet.row_bytes, 0
        for span in plan.spans:
            start, count = int(span["start"]), int(span["count"])
            trees = self._open[int(span["seq"])]
            trees.inlet.append(start, received[row * size_in : (row + count) * size_in])
            trees.outlet.append(start, sent[row * size_out : (row + count) * size_out])
            row += count
        self.rows_hashed += row
        for item in plan.closes:
            self._end(plan.epoch, int(item["seq"]), bool(item["seal"]))
        for seq in plan.signs:
            self._sign(plan.epoch, int(seq))

    def _end(self, epoch: int, seq: int, seal: bool) -> None:
        self._closed.pop(seq, None)
        trees = self._open.pop(seq, None)
        if trees is None or not seal:
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
