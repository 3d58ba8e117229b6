"""Who waits, who runs, and which pages each may write: seating, preemption, and what is found in the prefix cache."""

from __future__ import annotations

import bisect
from collections.abc import Collection

from serve_app.messages.step import ABANDON, MAX_ITEMS
from serve_app.scheduling.pages import PagePool, no_page, page_names
from serve_app.scheduling.sequence import Sequence

_MAX_CACHED = MAX_ITEMS // 2  # pages: those of one beginning travel in one plan, beside what else it holds


class Seats:
    """The only owner of pages. Law: whoever is first in rank is never preempted, and seated before anybody else."""

    def __init__(self, n_pages: int, page_size: int, max_running: int, prefix_cache: bool) -> None:
        self.pool = PagePool(n_pages)
        self.page_size = page_size
        self._max_running = max_running
        self._prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []  # by rank
        self.running: dict[int, Sequence] = {}
        self.order: list[Sequence] = []  # the running ones, by rank
        self.closes: list[tuple[int, int, int]] = []  # what the stages are to be told: seq, rows, what then
        self.preemptions = 0
        self.rows_abandoned = 0  # rows that ran for attempts that were given up

    def find(self, seq: int) -> Sequence | None:
        """The sequence of this number, if it has not ended."""
        return self.running.get(seq) or next((s for s in self.waiting if s.ticket.seq == seq), None)

    def pages_of(self, rows: int) -> int:
        """How many pages hold so many rows."""
        return -(-rows // self.page_size)

    def wait(self, sequence: Sequence) -> None:
        """It waits, in its place by rank."""
        bisect.insort(self.waiting, sequence, key=lambda s: s.rank)

    def let_in(self) -> None:
        """Seat those who wait, in order: a smaller request behind one that does not fit must not starve it."""
        while self.waiting and len(self.running) < self._max_running:
            first = self.waiting[0]
            if first.flights:
                return  # of the attempt before: what they draw comes first
            # A page for each that runs: else the newcomer would soon be thrown out again, or throw out another.
            spare = self.pool.free - len(self.order)
            if spare <= 0:
                return
            cached = self._cached(first)
            need = self.pages_of(first.rows_to_fill) - len(cached) + self.pool.unheld(cached)
            if spare < need or spare < need + self._owed():
                return
            del self.waiting[0]
            self.pool.share(cached)
            first.seat(cached, len(cached) * self.page_size)
            self.running[first.ticket.seq] = first
            bisect.insort(self.order, first, key=lambda s: s.rank)

    def grow(self, sequence: Sequence, pages: int) -> list[int]:
        """Further pages for a sequence, which must be free."""
        new = self.pool.take(pages)
        sequence.pages += new
        return new

    def make_room(self, sequence: Sequence, pages: int, planned: Collection[Sequence]) -> bool:
        """Whether so many pages are free now. Preempts what ranks behind, the last first, and is not in this step."""
        if self.pool.free >= pages:
            return True
        for last in reversed(self.order[self.order.index(sequence) + 1 :]):
            # One that ends with its next step gives its pages back without having to run again.
            if last.pages and last not in planned and last.ending is None:
                self._preempt(last)
                if self.pool.free >= pages:
                    return True
        return False  # it waits, and keeps what it has until somebody before it needs that

    def offer(self, sequence: Sequence) -> None:
        """Let others find the pages of a running sequence whose rows have all come back."""
        full = sequence.done // self.page_size
        if self._prefix_cache and sequence.offers:
            names = self._names(sequence, full)
            for i in range(sequence.offered, full):
                self.pool.name(sequence.pages[i], names[i])
        sequence.offered = full

    def distrust(self) -> None:
        """Nobody finds any page that was filled until now, nor what is computed from one."""
        self.pool.forget()
        for sequence in self.order:
            sequence.offers = False

    def leave(self, sequence: Sequence) -> None:
        """Out of the running. Its pages are free."""
        # Stages work through messages in order, so a page given back here is rewritten only after every
        # step that read it has run.
        del self.running[sequence.ticket.seq]
        self.order.remove(sequence)
        self.pool.give_back(sequence.pages)

    def clear(self) -> None:
        """The stages hold nothing any more: all that ran waits again, and no page can be found."""
        self.closes = []
        for sequence in list(self.order):
            self.leave(sequence)
            if sequence.opened:
                self.rows_abandoned += sequence.computed - sequence.cached
                sequence.attempt += 1
            sequence.unseat()
            self.wait(sequence)
        for sequence in self.waiting:
            sequence.flights, sequence.guesses = 0, ()
        self.pool.forget()

    def _preempt(self, sequence: Sequence) -> None:
        self.leave(sequence)
        if sequence.opened:
            self.closes.append((sequence.ticket.seq, sequence.computed, ABANDON))
            self.rows_abandoned += sequence.computed - sequence.cached
            self.preemptions += 1
            sequence.attempt += 1
        sequence.unseat()
        self.wait(sequence)

    def _owed(self) -> int:
        """Pages that the running sequences will take for rows of tokens known when they were seated."""
        return sum(self.pages_of(s.fill) - len(s.pages) for s in self.order if s.computed < s.fill)

    def _cached(self, sequence: Sequence) -> list[int]:
        """Pages that hold the first rows of a sequence already. At least one row must run: it has something to give."""
        if not self._prefix_cache:
            return []
        pages = min((sequence.rows_to_fill - 1) // self.page_size, _MAX_CACHED)
        return self.pool.find(self._names(sequence, pages))

    def _names(self, sequence: Sequence, pages: int) -> list[bytes]:
        """The names of a sequence's first pages, at least so many; each is hashed once."""
        names, size = sequence.names, self.page_size
        if len(names) < pages:
            ids = sequence.tokens[len(names) * size : pages * size]
            names += page_names(names[-1] if names else no_page(sequence.ticket.cache_salt), ids, size)
        return names[:pages]
