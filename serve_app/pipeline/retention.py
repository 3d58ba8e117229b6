"""The rows that a stage received and sent, kept on the host so that somebody can compute them again.

Rows lie in pages like the keys and values they led to, so a sequence that opens behind pages which an earlier one
filled shares that one's rows. They are copied by the thread that hashes them, a step behind the pipeline.
Memory is bounded: past it the oldest record that nobody drew goes, and is counted if it might still have been drawn,
because a request that cannot be audited must not look as if it could. What was promised to a client is held, once it is
drawn, until it is released or its time is over. Knows requests by hash and attempt, as the stage's statement names
them, and nothing of audits.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serve_app.engine.engine import StepOutput
from serve_app.messages.record import StageRecord
from serve_app.messages.step import SEAL, StepPlan

# How long a draw may take to come, and a drawn record to be fetched: a verdict is due 60 s after the answer.
HOLD_S = 60.0
_MAX_SPENT = 4096  # records; many may share one page


@dataclass(slots=True)
class _Page:
    place: int  # in the pool
    filled: int = 0  # rows
    holders: int = 0  # records that it is a part of


class _Pool:
    """Memory for pages of rows, taken from the system as it is first used.

    One array for all: the rows of a step that decodes, one of each of many sequences, then go to their places at once.
    """

    def __init__(self, pages: int, page_size: int, bytes_in: int, bytes_out: int) -> None:
        """bytes_in, bytes_out: of a row."""
        self.received = np.empty((pages, page_size, bytes_in), np.uint8)
        self.sent = np.empty((pages, page_size, bytes_out), np.uint8)
        self.page_bytes = page_size * (bytes_in + bytes_out)
        self._fresh = iter(range(pages))
        self._free: list[int] = []

    def take(self) -> int | None:
        """A place for a page, or None if there is none."""
        return self._free.pop() if self._free else next(self._fresh, None)

    def give_back(self, place: int) -> None:
        """Nobody needs what lies there."""
        self._free.append(place)

    def fits(self, bytes_in: int, bytes_out: int) -> bool:
        """Whether it is for such rows."""
        return (self.received.shape[2], self.sent.shape[2]) == (bytes_in, bytes_out)


@dataclass(slots=True)
class _Record:
    request: bytes
    attempt: int
    pages: list[_Page] = field(default_factory=list)
    rows: int = 0
    lost: bool = False  # some of its rows are not there
    closed_s: float = 0.0
    held_until_s: float = 0.0


class Retention:
    """One stage's records; written by its witness's thread, read by others. Outlives the Stages of one process."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._clock = max_bytes, clock
        self._lock = threading.Lock()
        self._page_size, self._stage = 0, -1
        self._pool: _Pool | None = None  # made when it is known how long rows are
        self._open: dict[int, _Record] = {}
        self._closed: OrderedDict[tuple[bytes, int], _Record] = OrderedDict()  # by the time of closing
        self._by_page: dict[int, _Page] = {}  # what lies in each KV page now
        # Records that nobody asks for any more. Their pages go first when room is needed; until then they are the rows
        # of what may yet open behind them.
        self._spent: deque[_Record] = deque()
        self.bytes = 0
        self.unauditable = 0  # sealed requests whose rows were not there, or went before a draw could ask for them
        self.timed_out = 0  # promised ones that nobody released in time

    def begin(self, stage: int, page_size: int) -> None:
        """This Stage begins, whose engine knows no sequence. What the same one sealed before stays."""
        with self._lock:
            gone = [*self._open.values(), *self._spent]
            if stage != self._stage or page_size != self._page_size:
                gone += self._closed.values()
                self._closed.clear()
            for record in gone:
                self._drop(record)
            if page_size != self._page_size:
                self._pool, self.bytes = None, 0
            self._stage, self._page_size = stage, page_size
            self._open.clear()
            self._spent.clear()
            self._by_page.clear()

    def saw(self, plan: StepPlan, output: StepOutput | None) -> None:
        """A step has run; None: it failed, and its rows will never be known."""
        with self._lock:
            if output is None:
                for seq in plan.spans["seq"].tolist():
                    self._lose(self._open.get(seq))
            else:
                for item in plan.opens:
                    self._open[int(item["seq"])] = _Record(item["request"].tobytes(), int(item["attempt"]))
                if plan.rows:
                    self._take(plan, output)
            for seq, rows, seal in plan.closes.tolist():
                record = self._open.pop(seq, None)
                if record is not None:
                    self._close(record, rows, seal == SEAL)

    def hold(self, request: bytes, attempt: int, *, promised: bool) -> bool:
        """It is drawn. Returns whether it is there.

        promised: it is kept until released, for HOLD_S at most. Else it only goes as if it were the latest: nothing was
        set aside for it, and it must not take the place of what something was.
        """
        key = request, attempt
        with self._lock:
            record = self._closed.get(key)
            if record is None:
                return False
            self._closed.move_to_end(key)
            if promised:
                record.held_until_s = self._clock() + HOLD_S
            return True

    def read(self, request: bytes, attempt: int) -> StageRecord | None:
        """Its rows, or None if they are not there."""
        with self._lock:
            record = self._closed.get((request, attempt))
            if record is None or not record.pages:
                return None
            assert self._pool is not None
            pool, pages, rows = self._pool, list(record.pages), record.rows
            for page in pages:
                page.holders += 1
        try:  # outside the lock, which the witness may wait for: nobody writes to rows that were sealed
            places = [page.place for page in pages]
            return StageRecord(_first(pool.received[places], rows), _first(pool.sent[places], rows))
        finally:
            with self._lock:
                if pool is self._pool:
                    self._let_go(pages)

    def release(self, request: bytes, attempt: int) -> None:
        """It is no longer needed here."""
        with self._lock:
            record = self._closed.pop((request, attempt), None)
            if record is not None:
                self._spend(record)

    def _take(self, plan: StepPlan, output: StepOutput) -> None:
        size, rows = self._page_size, plan.rows
        came, left = output.kept or (output.received, output.hidden)
        received, sent = (np.frombuffer(part, np.uint8).reshape(rows, -1) for part in (came, left))
        pool = self._pool_for(received.shape[1], sent.shape[1])
        cached = dict(plan.opens[["seq", "cached"]].tolist())
        pages = iter(plan.pages.tolist())
        single: list[tuple[int, int, int]] = []  # row of the step, place in the pool, and in the page
        row = 0
        for seq, start, count, n_new, _ in plan.spans.tolist():
            record = self._open.get(seq)
            if n_new:
                self._add_pages(record, [next(pages) for _ in range(n_new)], cached.get(seq, 0) // size)
            if record is not None and not record.lost:
                position, taken = start, 0
                while taken < count:  # what lies behind `start` already was guessed, and wrong
                    page, at = record.pages[position // size], position % size
                    n = min(size - at, count - taken)
                    if n == 1:
                        single.append((row + taken, page.place, at))
                    else:
                        pool.received[page.place, at : at + n] = received[row + taken : row + taken + n]
                        pool.sent[page.place, at : at + n] = sent[row + taken : row + taken + n]
                    page.filled = at + n
                    position, taken = position + n, taken + n
                record.rows = start + count
            row += count
        if single:
            which, places, ats = np.array(single).T
            pool.received[places, ats] = received[which]
            pool.sent[places, ats] = sent[which]

    def _pool_for(self, bytes_in: int, bytes_out: int) -> _Pool:
        pool = self._pool
        if pool is None or not pool.fits(bytes_in, bytes_out):
            for record in [*self._closed.values(), *self._spent]:  # of another engine, whose rows had another length
                self._drop(record)
            self._closed.clear()
            self._spent.clear()
            pages = self._max_bytes // (self._page_size * (bytes_in + bytes_out))
            self.bytes = 0
            pool = self._pool = _Pool(pages, self._page_size, bytes_in, bytes_out)
        return pool

    def _add_pages(self, record: _Record | None, numbers: list[int], filled: int) -> None:
        """The next pages of a record, or of nobody's; the first `filled` of them hold rows already."""
        for i, number in enumerate(numbers):
            if i >= filled:
                self._by_page.pop(number, None)
            if record is not None and not record.lost:
                self._add_page(record, number, i < filled)

    def _add_page(self, record: _Record, number: int, filled: bool) -> None:
        assert self._pool is not None
        if filled:
            page = self._by_page.get(number)
            if page is None or page.filled < self._page_size:
                self._lose(record)  # the rows of a shared beginning went before
                return
        else:
            place = self._place_for(record)
            if place is None:
                self._lose(record)
                return
            page = self._by_page[number] = _Page(place)
            self.bytes += self._pool.page_bytes
        page.holders += 1
        record.pages.append(page)

    def _place_for(self, asking: _Record) -> int | None:
        """Of a new page. The oldest that nobody drew makes room: spent ones first, then closed ones, then open ones."""
        assert self._pool is not None
        now = self._clock()
        while (place := self._pool.take()) is None:
            if self._spent:
                self._drop(self._spent.popleft())
                continue
            key = next((k for k, r in self._closed.items() if r.held_until_s <= now), None)
            if key is not None:
                record = self._closed.pop(key)
                if record.held_until_s:
                    self.timed_out += 1
                elif now - record.closed_s < HOLD_S:
                    self.unauditable += 1
                self._drop(record)
                continue
            victim = next((r for r in self._open.values() if not r.lost and r.pages and r is not asking), None)
            if victim is None:
                return None
            self._lose(victim)
        return place

    def _close(self, record: _Record, rows: int, sealed: bool) -> None:
        if not sealed:
            self._spend(record)
            return
        if record.lost or record.rows < rows:
            self.unauditable += 1
            self._drop(record)
            return
        record.rows, record.closed_s = rows, self._clock()
        before = self._closed.pop((record.request, record.attempt), None)
        if before is not None:
            self._drop(before)
        self._closed[record.request, record.attempt] = record

    def _spend(self, record: _Record) -> None:
        self._spent.append(record)
        if len(self._spent) > _MAX_SPENT:
            self._drop(self._spent.popleft())

    def _lose(self, record: _Record | None) -> None:
        if record is not None:
            record.lost = True
            self._drop(record)

    def _drop(self, record: _Record) -> None:
        self._let_go(record.pages)
        record.pages = []

    def _let_go(self, pages: list[_Page]) -> None:
        for page in pages:
            page.holders -= 1
            if page.holders == 0:
                assert self._pool is not None
                self.bytes -= self._pool.page_bytes
                self._pool.give_back(page.place)
                page.filled = 0  # some KV page may still be known by it, whose rows are not kept any more


def _first(pages: npt.NDArray[np.uint8], rows: int) -> bytes:
    """The first so many rows of [pages, page_size, bytes of a row]."""
    return pages.reshape(-1, pages.shape[2])[:rows].tobytes()
