"""Hashes what a stage received and sent, and signs for it, off the critical path.

A thread of its own works through steps in order, at most BEHIND of them late; then the stage waits. For every open
sequence it grows two trees, of the bytes as they came in and as they went out, page of rows by page. A close says how
many rows count, which may be some less than ran, so the last page joins the trees only when it is known to count. So
does a span that begins before rows which ran: these were guesses, and wrong, and it takes their place. A close makes
it tell the Head both roots; only when the Head says that all stages' roots match does it sign.
What a KV page holds is remembered by the roots of its rows: a sequence that opens behind pages which an earlier one
filled begins its trees with their roots. They are of the bytes that this stage itself received and sent at that time.
Where deliveries are signed (deliveries.py), both sides say with each step what its sequences have come to.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serve_app.engine.engine import StepOutput
from serve_app.messages.step import ABANDON, MAX_GUESSES, NO_STEP, SEAL, Fault, Reply, Signed, StepPlan
from serve_app.pipeline.deliveries import Deliveries, covered_by, ended
from serve_app.pipeline.drawn_ids import DrawnIds, add_draws, opened
from serve_app.pipeline.retention import Retention
from serve_app.receipts import rows_native
from serve_app.receipts.rows import PAGE_ROWS, Boundary, RowTree, ids_boundary, leaves_of, page_roots
from serve_app.receipts.statement import StageStatement, StatementChain
from shard_tools import canonical
from shard_tools.cid import Cid

_RING = 2 * PAGE_ROWS  # the page that fills and the one before it, whose rows may turn out void
BEHIND = 2  # steps: what DESIGN 2.7 allows between a row leaving and its hash
_MAX_UNSIGNED = 4096  # closed sequences kept for a signature that never came (a Head that died)
_LOOK = None, None  # no step: look whether a signature has come
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
    slot: int  # of its last leaves
    table: list[int] = field(default_factory=list)  # KV pages
    last: tuple[bytes, bytes] | None = None  # roots of the last full page, which may turn out void
    reused: int = 0  # rows that ran for an earlier sequence
    lost: bool = False  # a step of it failed: what came before that counts, what comes after does not
    ended_ms: int = 0
    drawn: DrawnIds | None = None  # of the last stage


class Witness:
    """One stage's memory of what it has seen; speaks to the Head through `reply`."""

    def __init__(
        self,
        span: StageSpan,
        chain: StatementChain,
        reply: Callable[[Reply], None],
        *,
        page_size: int,
        hashed: bool = False,
        retention: Retention | None = None,
        deliveries: Deliveries | None = None,
    ) -> None:
        """page_size: of the engine's KV pages; unless it is a multiple of PAGE_ROWS, none can be reused.

        hashed: steps come with the engine's own digests of their rows. retention: keeps the rows themselves.
        """
        rows_native.prepare()
        self._page_blocks, rest = divmod(page_size, PAGE_ROWS)  # pages of rows in a KV page
        if rest:
            self._page_blocks = 0
        self._span, self._chain, self._reply, self._hashed = span, chain, reply, hashed
        self._draws = span.stage == span.n_stages - 1
        self._retention = retention
        self._deliveries = deliveries or Deliveries.nowhere(span.manifest, span.stage, chain.session, reply)
        self._work: queue.Queue[tuple[StepPlan | None, StepOutput | None] | None] = queue.Queue(BEHIND)
        self._open: dict[int, _Trees] = {}
        # By KV page: the roots, in and out, of the pages of rows in it, while it holds them.
        self._roots: dict[int, list[tuple[bytes, bytes]]] = {}
        # The last leaves of each sequence, by slot, in or out, and position % _RING.
        self._latest = np.zeros((64, 2, _RING, 32), np.uint8)
        self._seen = np.zeros(64, np.int64)  # rows of the sequence in each slot
        self._free = list(range(63, -1, -1))
        self._closed: OrderedDict[int, _Trees] = OrderedDict()
        self.rows_hashed = 0  # of closed sequences; benchmarks compare it with the tokens processed
        self.rows_reused = 0  # of closed sequences: hashed when they ran for an earlier one
        self.rows_abandoned = 0  # of attempts that were given up; not among those hashed
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def saw(self, plan: StepPlan, output: StepOutput) -> None:
        """A step has run. Blocks while BEHIND steps wait."""
        self._work.put((plan, output))

    def lost(self, plan: StepPlan) -> None:
        """A step failed: its rows will never be known, so nothing that needs them is signed."""
        self._work.put((plan, None))

    def look(self) -> None:
        """What the stage before signed for a step has come."""
        with contextlib.suppress(queue.Full):  # else it is looked at behind what waits
            self._work.put_nowait(_LOOK)

    def close(self) -> None:
        """Work off what is queued, then stop."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._deliveries.next_of(self._work, _LOOK)) is not None:
            plan, output = item
            try:
                if plan is None:
                    self._refuse(self._deliveries.look())
                    continue
                if output is None:
                    for seq in plan.spans["seq"].tolist():
                        # Not forgotten: its answer may have ended before these rows, which are void then.
                        if seq in self._open:
                            self._open[seq].lost = True
                else:
                    self._hash(plan, output)
                if self._retention is not None:
                    self._retention.saw(plan, output)
                self._end_and_sign(plan, ran=output is not None)
            except Exception as e:
                epoch, step = (plan.epoch, plan.step) if plan else (self._chain.session.epoch, NO_STEP)
                _log.exception("stage %d could not witness step %d", self._span.stage, step)
                # Of no step: what it would have ended or signed is lost with it, and the step itself may run yet.
                self._reply(Fault(epoch, self._span.stage, NO_STEP, f"hashing or signing failed: {e}"))

    def _hash(self, plan: StepPlan, output: StepOutput) -> None:
        draws = opened(self._span.manifest, plan) if self._draws else {}
        for item in plan.opens:
            inlet, outlet = RowTree(self._span.inlet), RowTree(self._span.outlet)
            slot = self._free.pop() if self._free else self._lengthen()
            self._seen[slot] = 0
            seq = int(item["seq"])
            self._open[seq] = _Trees(
                item["request"].tobytes(), int(item["attempt"]), _now_ms(), inlet, outlet, slot, drawn=draws.get(seq)
            )
        if plan.rows == 0:
            return
        seqs = plan.spans["seq"].tolist()
        trees = [own if (own := self._open.get(seq)) and not own.lost else None for seq in seqs]
        self._take_pages(plan, trees)
        if self._draws:
            add_draws(plan, [own.drawn if own else None for own in trees], output.tokens)
        leaves_in, leaves_out = self._leaves(plan, output)
        starts, counts = plan.spans["start"].astype(np.int64), plan.spans["count"].astype(np.int64)
        first = np.cumsum(counts) - counts
        for i in np.flatnonzero(counts > 1).tolist():
            own, rows = trees[i], slice(int(first[i]), int(first[i] + counts[i]))
            if own is not None:
                self._add(own, int(starts[i]), leaves_in[rows], leaves_out[rows])
        # One assignment for all single rows, and a turn of Python only for the one in sixteen that fills its page.
        kept = np.array([i for i in np.flatnonzero(counts == 1).tolist() if trees[i] is not None], np.int64)
        slots = np.array([trees[i].slot for i in kept], np.int64)
        for i in kept[self._seen[slots] > starts[kept]].tolist():
            self._go_back(trees[i], int(starts[i]))
        assert (self._seen[slots] == starts[kept]).all(), "rows with a gap"
        self._seen[slots] = starts[kept] + 1
        places, rows_kept = starts[kept] % _RING, first[kept]
        self._latest[slots, 0, places] = leaves_in[rows_kept]
        self._latest[slots, 1, places] = leaves_out[rows_kept]
        fills = starts[kept] % PAGE_ROWS == PAGE_ROWS - 1
        full = kept[fills]
        if len(full):
            begun = starts[full] + 1 - PAGE_ROWS
            halves = self._latest.reshape(len(self._latest), 2, _RING // PAGE_ROWS, PAGE_ROWS, 32)
            roots = page_roots(halves[slots[fills], :, begun % _RING // PAGE_ROWS].tobytes())  # in, out, in, out, ...
            for n, (i, start) in enumerate(zip(full.tolist(), begun.tolist(), strict=True)):
                self._fill(trees[i], start, roots[2 * n], roots[2 * n + 1])

    def _take_pages(self, plan: StepPlan, trees: list[_Trees | None]) -> None:
        """Note whose pages are whose; begin the trees of sequences that open behind filled ones."""
        if not self._page_blocks:
            assert not plan.opens["cached"].any(), "rows of KV pages that are no whole pages of rows cannot be reused"
            return
        cached = dict(plan.opens[["seq", "cached"]].tolist())
        page_counts = plan.spans["new_pages"].astype(np.int64)
        stops = np.cumsum(page_counts)
        for i in np.flatnonzero(page_counts).tolist():
            own, new = trees[i], plan.pages[stops[i] - page_counts[i] : stops[i]].tolist()
            filled = cached.get(int(plan.spans["seq"][i]), 0) // (self._page_blocks * PAGE_ROWS)
            for page in new[filled:]:
                self._roots.pop(page, None)
            if own is not None:
                own.table += new
                for page in new[:filled]:
                    self._reuse(own, page)

    def _reuse(self, trees: _Trees, page: int) -> None:
        roots = self._roots.get(page, [])
        assert len(roots) == self._page_blocks, f"page {page} holds no rows that this stage has seen"
        for root_in, root_out in roots:
            trees.inlet.append_page(len(trees.inlet), root_in)
            trees.outlet.append_page(len(trees.outlet), root_out)
        trees.reused = len(trees.inlet)
        self._seen[trees.slot] = trees.reused

    def _add(self, trees: _Trees, start: int, leaves_in: Leaves, leaves_out: Leaves) -> None:
        """Several rows of one sequence."""
        if self._seen[trees.slot] > start:
            self._go_back(trees, start)
        assert self._seen[trees.slot] == start, "rows with a gap"
        stop = start + len(leaves_in)
        begun = min(stop, -(-start // PAGE_ROWS) * PAGE_ROWS)  # the first whole page begins here
        whole = max(begun, stop // PAGE_ROWS * PAGE_ROWS)  # and the last ends here
        if begun > start:
            self._keep(trees, start, leaves_in[: begun - start], leaves_out[: begun - start])
            if begun % PAGE_ROWS == 0:
                page = self._latest[trees.slot, :, (begun - PAGE_ROWS) % _RING :][:, :PAGE_ROWS]
                self._fill(trees, begun - PAGE_ROWS, *page_roots(page.tobytes()))
        rows = slice(begun - start, whole - start)
        pages = zip(page_roots(leaves_in[rows].tobytes()), page_roots(leaves_out[rows].tobytes()), strict=True)
        for n, (root_in, root_out) in enumerate(pages):
            self._fill(trees, begun + n * PAGE_ROWS, root_in, root_out)
        self._keep(trees, whole, leaves_in[whole - start :], leaves_out[whole - start :])
        self._seen[trees.slot] = stop

    def _go_back(self, trees: _Trees, rows: int) -> None:
        """Of the rows seen only the first `rows` count: those behind were guesses, too few to begin and fill a page."""
        assert self._seen[trees.slot] - rows <= MAX_GUESSES and rows >= len(trees.inlet), "rows that counted are void"
        self._seen[trees.slot] = rows
        if trees.last is not None and rows < len(trees.inlet) + PAGE_ROWS:
            trees.last = None
            if self._page_blocks:
                self._roots[trees.table[len(trees.inlet) // PAGE_ROWS // self._page_blocks]].pop()

    def _keep(self, trees: _Trees, start: int, leaves_in: Leaves, leaves_out: Leaves) -> None:
        """Leaves of a part of one page."""
        places = np.arange(start, start + len(leaves_in)) % _RING
        self._latest[trees.slot, 0, places] = leaves_in
        self._latest[trees.slot, 1, places] = leaves_out

    def _fill(self, trees: _Trees, start: int, root_in: bytes, root_out: bytes) -> None:
        """The page of rows that begins at `start` is full and has these roots; so the page before it counts."""
        self._settle(trees)
        trees.last = root_in, root_out
        if self._page_blocks:
            page, block = divmod(start // PAGE_ROWS, self._page_blocks)
            roots = self._roots.setdefault(trees.table[page], [])
            assert len(roots) == block, f"page {trees.table[page]} is filled out of order"
            roots.append(trees.last)

    def _settle(self, trees: _Trees) -> None:
        """The last full page counts."""
        if trees.last is not None:
            trees.inlet.append_page(len(trees.inlet), trees.last[0])
            trees.outlet.append_page(len(trees.outlet), trees.last[1])
            trees.last = None

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

    def _lengthen(self) -> int:
        """Room for more sequences; a slot of it."""
        old = len(self._latest)
        self._latest = np.concatenate([self._latest, np.zeros_like(self._latest)])
        self._seen = np.concatenate([self._seen, np.zeros_like(self._seen)])
        self._free += range(2 * old - 1, old, -1)
        return old

    def _end_and_sign(self, plan: StepPlan, *, ran: bool) -> None:
        covered = covered_by(plan, self._open, self._latest, self._deliveries.terms) if ran else []
        for seq, rows, seal in plan.closes.tolist():
            trees = self._end(seq, rows, seal)
            if trees is not None:
                covered.append(ended(seq, trees))
        self._refuse(self._deliveries.stepped(plan.step, covered))
        for seq in plan.signs.tolist():
            self._sign(plan.epoch, seq)

    def _refuse(self, seqs: list[int]) -> None:
        """The rows of these are not what was signed for: they are not hashed on, and never signed for here."""
        for seq in seqs:
            self._closed.pop(seq, None)
            if seq in self._open:
                self._open[seq].lost = True

    def _end(self, seq: int, rows: int, seal: int) -> _Trees | None:
        """A sequence ends; its trees, where the Head is to be told of them."""
        self._closed.pop(seq, None)
        trees = self._forget(seq)
        if trees is None:
            return None
        seen = int(self._seen[trees.slot])
        if seal == ABANDON:
            self.rows_abandoned += min(rows, seen) - trees.reused
            return None
        self.rows_hashed += min(rows, seen) - trees.reused
        self.rows_reused += trees.reused
        if seal != SEAL:
            return None
        self._complete(trees, min(rows, seen))
        trees.ended_ms = _now_ms()
        self._closed[seq] = trees
        if len(self._closed) > _MAX_UNSIGNED:
            self._closed.popitem(last=False)
        return trees

    def _complete(self, trees: _Trees, rows: int) -> None:
        """The trees hold the first `rows` rows of the sequence."""
        if rows >= len(trees.inlet) + PAGE_ROWS:
            self._settle(trees)
        start = len(trees.inlet)
        assert start <= rows < start + _RING, f"{rows} rows count of a sequence of which {start} were taken to count"
        leaves_in, leaves_out = self._latest[trees.slot][:, np.arange(start, rows) % _RING]
        trees.inlet.append_leaves(start, leaves_in.tobytes())
        trees.outlet.append_leaves(start, leaves_out.tobytes())

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
            drawn=None if trees.drawn is None else trees.drawn.sealed(span.manifest, len(trees.inlet)),
        )
        envelope = self._chain.sign(statement)
        self._reply(Signed(epoch, span.stage, seq, canonical.encode(envelope.to_value())))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
