"""Which rows run next: continuous batching with chunked prefill under a token budget.

Pure: no Ray, no torch, no clock. `admit`, then `plan` / `apply` in turn, with several steps in flight, so that every
stage of a pipeline has work. The chunks of a prompt may be in several steps at a time. A sequence that draws waits
for its token, unless one engine both draws and embeds: then with `lookahead` it also runs the row of the token on its
way (DRAWN_LAST), so that the engine never waits for the Head; if that token ends the sequence, such rows are void.
Requests join and leave between any two steps. Decoding rows go first, then prefill chunks fill the budget.

Pages are taken as rows need them. A request is seated when those of its prompt are there. Where a running sequence
finds none, the last in rank is preempted: the stages forget it, it waits again, and later runs anew as a prompt of all
its tokens. Tokens on their way at that moment were drawn from pages still whole, so they count when they come; only
then may it be seated. Nobody ranks before the first, so the first always goes on and every request ends.
"""

from __future__ import annotations

import bisect
import math
from typing import Literal

import numpy as np

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.controls import Controls
from serve_app.messages.request import FinishReason
from serve_app.messages.step import ABANDON, CLOSE, DRAWN_LAST, FORGET, OPEN, SEAL, SPAN, StepPlan, StepResult
from serve_app.scheduling.pages import PagePool
from serve_app.scheduling.sequence import Committed, Sequence, Ticket

__all__ = ["Committed", "Scheduler", "Ticket", "lookahead", "max_flights"]

_Flight = list[tuple[Sequence, bool, int]]  # sequences of a step, sampled or not, rows that have run after it


def max_flights(stages: int) -> int:
    """Steps on their way at a time: one more than stages keeps each busy while tokens travel back."""
    return stages + 1 + lookahead(stages) // 2


def lookahead(stages: int) -> int:
    """For a pipeline of so many stages. Two tokens ahead hide the Head even where a step takes a millisecond."""
    return 2 if stages == 1 else 0


class Scheduler:
    """The only owner of sequences and pages."""

    def __init__(
        self,
        *,
        epoch: int,
        n_pages: int,
        page_size: int,
        max_step_tokens: int,
        max_running: int,
        max_waiting: int,
        micro_batches: int,
        lookahead: int = 0,
    ) -> None:
        """micro_batches: into how many steps the running sequences are shared out.

        lookahead: tokens that may be on their way when a further row is planned; 0 unless one engine draws and embeds.
        """
        self._epoch = epoch
        self._pool = PagePool(n_pages)
        self._page_size = page_size
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._micro_batches = micro_batches
        self._lookahead = lookahead
        self._arrivals = 0
        self._waiting: list[Sequence] = []  # by rank
        self._running: dict[int, Sequence] = {}
        self._order: list[Sequence] = []  # the running ones, by rank
        self._flights: dict[int, _Flight] = {}
        self._closes: list[tuple[int, int, int]] = []  # seq, rows, what then
        self._signs: list[int] = []
        self._next_step = 0
        self.preemptions = 0
        self.rows_abandoned = 0  # rows that ran for attempts that were given up

    @property
    def running(self) -> int:
        """Sequences that hold pages, or may take them."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests let in that hold nothing: not seated yet, or preempted."""
        return len(self._waiting)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._pool.free

    @property
    def in_flight(self) -> int:
        """Steps planned whose result has not come."""
        return len(self._flights)

    def admit(self, ticket: Ticket) -> None:
        """Queue the request. Raises OverloadedError when full, RequestError when it can never fit."""
        # The last token is never fed back, so it needs no row.
        need = self._pages_of(len(ticket.prompt_ids) + ticket.max_tokens - 1)
        if need > self._pool.n_pages:
            raise RequestError(
                f"the request may grow to {need * self._page_size} tokens and this pipeline has room for "
                f"{self._pool.n_pages * self._page_size}: ask for fewer tokens or raise pipeline.kv_pages"
            )
        sequence = Sequence.of(ticket, self._arrivals)
        self._arrivals += 1
        self._wait(sequence)
        self._let_in()  # only what cannot run yet counts as waiting
        if not sequence.seated and len(self._waiting) > self._max_waiting:
            self._waiting.remove(sequence)
            raise OverloadedError(f"{self.running} requests run and {len(self._waiting)} wait already")

    def stop(self, seq: int, reason: Literal["stop", "cancelled"]) -> Committed | None:
        """End a sequence now, or when its step in flight is back.

        Returns its end if it ended at once, else None: `apply` will tell. Unknown sequences have ended
        already: None. One that drew, and whose rows are gone or have not all run again, runs them first.
        """
        sequence = self._find(seq)
        if sequence is None or (sequence.final is not None and reason == "stop"):
            return None
        if not sequence.seated and (reason == "cancelled" or not sequence.drew):
            self._finish(sequence, "cancelled")
            return Committed(seq, None, "cancelled", sequence.attempt)
        if reason == "stop" and sequence.drew and not self._draws(sequence):
            sequence.final = "stop"
            sequence.fill = sequence.rows_to_fill
            if not sequence.seated or not sequence.is_whole:
                return None
        elif sequence.flights:
            sequence.ending = reason
            return None
        self._finish(sequence, reason)
        return Committed(seq, None, reason, sequence.attempt)

    def plan(self) -> StepPlan | None:
        """The next micro-batch, or None if nothing can run and nothing is to be closed or signed."""
        self._let_in()
        opens: list[Sequence] = []
        flight: _Flight = []
        starts: list[int] = []
        counts: list[int] = []
        page_counts: list[int] = []
        pages: list[int] = []
        decoding, prompts = self._ready()
        # An equal share for every micro-batch in flight: a front-loaded first one leaves the others' stages idle.
        quota = math.ceil(len(self._running) / self._micro_batches)
        budget = self._max_step_tokens
        for sequence in decoding[: min(quota, budget)]:
            start, page_count = sequence.computed, 0
            if start == len(sequence.pages) * self._page_size:
                if not sequence.seated or not self._make_room(sequence, 1, flight):
                    continue
                pages.append(self._grow(sequence, 1)[0])
                page_count = 1
            elif not sequence.seated:
                continue
            starts.append(start)
            counts.append(1)
            page_counts.append(page_count)
            sequence.computed = start + 1
            sequence.length += 1
            sequence.flights += 1
            flight.append((sequence, True, start + 1))
        budget -= len(flight)
        for sequence in prompts[: quota - len(flight)]:
            count = self._chunk(sequence, budget, flight)
            if count == 0:
                continue
            start, stop = sequence.computed, sequence.computed + count
            budget -= count
            new = self._grow(sequence, self._pages_of(stop) - len(sequence.pages))
            starts.append(start)
            counts.append(count)
            page_counts.append(len(new))
            pages += new
            if not sequence.opened:
                sequence.opened = True
                opens.append(sequence)
            sequence.computed = stop
            sample = stop == sequence.fill and sequence.final is None
            sequence.length += sample
            sequence.flights += 1
            flight.append((sequence, sample, stop))
        if not flight and not self._closes and not self._signs:
            return None
        spans = np.zeros(len(flight), SPAN)
        spans["seq"] = [sequence.ticket.seq for sequence, _, _ in flight]
        spans["sample"] = [sample for _, sample, _ in flight]
        spans["start"], spans["count"], spans["new_pages"] = starts, counts, page_counts
        plan = StepPlan(
            self._epoch,
            self._next_step,
            np.array([_open(s) for s in opens], OPEN),
            spans,
            np.array(pages, "<u4"),
            np.array(self._closes, CLOSE),
            np.array(self._signs, "<u8"),
            Controls.of((s.ticket.seq, s.ticket.sampling, s.tokens, s.n_prompt) for s in opens),
        )
        self._closes, self._signs = [], []
        if flight:
            self._flights[self._next_step] = flight
        self._next_step += 1
        return plan

    def rows_of(self, plan: StepPlan) -> bytes:
        """The token ids of a plan's rows, uint32 little-endian: stage 0's payload."""
        parts: list[int] = []
        for seq, start, count in zip(*(plan.spans[k].tolist() for k in ("seq", "start", "count")), strict=True):
            ids = self._running[seq].tokens[start : start + count]
            parts += ids or (DRAWN_LAST,)
        return np.array(parts, "<u4").tobytes()

    def apply(self, result: StepResult) -> list[Committed]:
        """Take in what the last stage drew; ended sequences give their pages back and are to be closed.

        Raises ProtocolError for a step not in flight or another number of tokens than it asked for; then
        nothing changed.
        """
        flight = self._flights.get(result.step)
        if flight is None:
            raise ProtocolError(f"step {result.step} was answered, which is not in flight")
        asked = sum(sampled for _, sampled, _ in flight)
        if len(result.tokens) != asked:
            raise ProtocolError(f"step {result.step} asked for {asked} tokens and got {len(result.tokens)}")
        del self._flights[result.step]
        tokens = iter(result.tokens)
        out: list[Committed] = []
        for sequence, sampled, stop in flight:
            sequence.flights -= 1
            sequence.done = stop
            token = next(tokens) if sampled else None
            if sequence.ended:
                continue  # while this step ran: its rows are void
            if sequence.final is not None:
                token = None  # it was known already where the answer ends
            if token is not None:
                sequence.tokens.append(token)
                sequence.final = sequence.ending
                if sequence.final is None and token in sequence.ticket.stop_ids:
                    sequence.final = "stop"
                if sequence.final is None and len(sequence.tokens) >= sequence.limit:
                    sequence.final = "length"
            elif sequence.ending is not None:
                sequence.final = sequence.ending
            reason = sequence.final
            if reason is not None and not (sequence.seated and (reason == "cancelled" or sequence.is_whole)):
                reason = None  # preempted, or running anew: its rows must run for the receipt
            if token is not None or reason is not None:
                out.append(Committed(sequence.ticket.seq, token, reason, sequence.attempt))
            if reason is not None:
                self._finish(sequence, reason)
        return out

    def sign(self, seq: int) -> None:
        """Every stage's roots of this closed sequence match: have them sign."""
        self._signs.append(seq)

    def drop(self, seq: int) -> None:
        """A sequence whose step will never come back: free its pages and tell the stages to forget it."""
        sequence = self._find(seq)
        if sequence is not None:
            self._finish(sequence, "error")

    def drop_step(self, step: int) -> list[int]:
        """A step failed in some stage: its sequences are dropped. Returns them.

        One preempted since is dropped too: steps behind this one read rows that never were.
        """
        dropped = [s.ticket.seq for s, _, _ in self._flights.pop(step, []) if not s.ended]
        for seq in dropped:
            self.drop(seq)
        return dropped

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """What may run, by rank: sequences that draw token after token; those with rows of known tokens left."""
        decoding, prompts, ahead = [], [], self._lookahead
        for sequence in self._order:
            if sequence.ending is not None:
                continue
            if sequence.computed < sequence.fill:
                prompts.append(sequence)
            elif (
                sequence.final is None
                and sequence.length < sequence.limit
                and sequence.length - len(sequence.tokens) <= ahead
            ):
                decoding.append(sequence)
        return decoding, prompts

    def _chunk(self, sequence: Sequence, budget: int, flight: _Flight) -> int:
        """How many rows of known tokens run now: what budget and pages allow."""
        count = min(sequence.fill - sequence.computed, budget)
        if count <= 0 or not sequence.seated:
            return 0
        missing = self._pages_of(sequence.computed + count) - len(sequence.pages)
        if self._make_room(sequence, missing, flight):
            return count
        room = (len(sequence.pages) + self._pool.free) * self._page_size
        return max(0, min(count, room - sequence.computed))

    def _make_room(self, sequence: Sequence, pages: int, flight: _Flight) -> bool:
        """Whether so many pages are free now. Preempts what ranks behind, the last first, and is not in this step."""
        if self._pool.free >= pages:
            return True
        planned = {s for s, _, _ in flight}
        for last in reversed(self._order[self._order.index(sequence) + 1 :]):
            # One that ends with its next step gives its pages back without having to run again.
            if last.pages and last not in planned and last.ending is None:
                self._preempt(last)
                if self._pool.free >= pages:
                    return True
        return False  # it waits, and keeps what it has until somebody before it needs that

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        if sequence.opened:
            self._closes.append((sequence.ticket.seq, sequence.computed, ABANDON))
            self.rows_abandoned += sequence.computed
            sequence.attempt += 1
            self.preemptions += 1
        sequence.unseat()
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=lambda s: s.rank)

    def _let_in(self) -> None:
        """Seat those who wait, in order: a smaller request behind one that does not fit must not starve it."""
        while self._waiting and len(self._running) < self._max_running:
            first = self._waiting[0]
            if first.flights:
                return  # of the attempt before: what they draw comes first
            # A page for each that runs: else the newcomer would soon be thrown out again, or throw out another.
            spare = self._pages_of(first.rows_to_fill) + len(self._order)
            if self._pool.free < spare or self._pool.free < spare + self._owed():
                return
            del self._waiting[0]
            first.seat()
            self._running[first.ticket.seq] = first
            bisect.insort(self._order, first, key=lambda s: s.rank)

    def _owed(self) -> int:
        """Pages that the running sequences will take for rows of tokens known when they were seated."""
        return sum(self._pages_of(s.fill) - len(s.pages) for s in self._order if s.computed < s.fill)

    def _grow(self, sequence: Sequence, pages: int) -> list[int]:
        new = self._pool.take(pages)
        sequence.pages += new
        return new

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running. Its pages are free."""
        # Stages work through messages in order, so a page given back here is rewritten only after every
        # step that read it has run.
        del self._running[sequence.ticket.seq]
        self._order.remove(sequence)
        self._pool.give_back(sequence.pages)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.ended = True
        if not sequence.seated:
            self._waiting.remove(sequence)
            return
        self._leave(sequence)
        if sequence.opened:
            sealed = reason in ("stop", "length") and sequence.drew  # a client that hung up waits for no receipt
            rows = len(sequence.tokens) - 1 if sequence.drew else sequence.computed
            self._closes.append((sequence.ticket.seq, rows, SEAL if sealed else FORGET))

    def _find(self, seq: int) -> Sequence | None:
        return self._running.get(seq) or next((s for s in self._waiting if s.ticket.seq == seq), None)

    def _draws(self, sequence: Sequence) -> bool:
        """Whether a token of a running sequence is on its way."""
        return sequence.seated and sequence.length > len(sequence.tokens)

    def _pages_of(self, rows: int) -> int:
        return -(-rows // self._page_size)


def _open(sequence: Sequence) -> tuple[object, ...]:
    ticket, sampling = sequence.ticket, sequence.ticket.sampling
    return (
        ticket.seq,
        np.frombuffer(ticket.request_hash, "u1"),
        np.frombuffer(ticket.sampling_key, "u1"),
        sampling.temperature_micro,
        sampling.top_k,
        sampling.top_p_micro,
        sequence.attempt,
    )
