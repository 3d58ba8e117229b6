"""Which rows run next: continuous batching with chunked prefill under a token budget.

Pure: no Ray, no torch, no clock. `admit`, then `plan` / `apply` in turn, with several steps in flight, so that every
stage of a pipeline has work. The chunks of a prompt may be in several steps at a time. A sequence that draws waits
for its token, unless tokens find their own way from where they are drawn to where they are embedded: then with
`lookahead` it also runs the row of the token on its way (DRAWN_LAST), so that no engine waits for the Head; if that
token ends the sequence, such rows are void.
Requests join and leave between any two steps.

Decoding rows go first, then prefill chunks; a part of the budget is the prompts' own, so neither starves the other.
What could run now is shared out evenly over the stages: a long prompt does not fill one micro-batch while the stages
that wait for the others stand idle. Who is earlier in rank, by priority and arrival (scheduling/sequence.py), is served
first: seated, given pages, kept.

Pages are taken as rows need them. A request is seated when those of its prompt are there. Where a running sequence
finds none, the last in rank is preempted: the stages forget it, it waits again, and later runs anew as a prompt of all
its tokens. Tokens on their way at that moment were drawn from pages still whole, so they count when they come; only
then may it be seated. Nobody ranks before the first, so the first always goes on and every request ends.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.request import FinishReason
from serve_app.messages.step import DRAWN_LAST, FORGET, MAX_ITEMS, SEAL, StepPlan, StepResult
from serve_app.scheduling.cohorts import Cohorts
from serve_app.scheduling.draft import Draft, Flight
from serve_app.scheduling.seats import Seats
from serve_app.scheduling.sequence import Committed, Sequence, Ticket

__all__ = ["Committed", "Scheduler", "Ticket", "flights_ahead", "lookahead", "max_flights"]

_CHUNKS = 8  # a pass over the weights for less than this part of the budget costs nearly what the whole would


def max_flights(stages: int, take_turns: bool = False) -> int:
    """Steps on their way at a time: one more than stages keeps each busy while tokens travel back.

    take_turns: all stages compute on the same cores. Then one step of all sequences is faster than several of few, each
    of which reads the weights again: two stages give what one gives, and half of it with three steps on their way.
    """
    return 1 if take_turns and stages > 1 else stages + 1 + lookahead(stages) // 2


def flights_ahead(stages: int) -> int:
    """As max_flights, of several stages of which the first learns of tokens without the Head.

    Each of the micro-batches has a step running and the next one planned.
    """
    return 2 * stages


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
        prefix_cache: bool = False,
    ) -> None:
        """micro_batches: into how many steps rows that could run together are shared out, one for each stage.

        lookahead: tokens that may be on their way when a further row is planned; see look_ahead.
        prefix_cache: the rows of a beginning that lies in some pages already do not run again.
        """
        self._epoch = epoch
        self._seats = Seats(n_pages, page_size, max_running, prefix_cache)
        self._max_step_tokens = max_step_tokens
        self._least_chunk = max(1, max_step_tokens // _CHUNKS)
        self._max_waiting = max_waiting
        self._micro_batches = micro_batches
        self._cohorts: Cohorts | None = None
        self.look_ahead(lookahead)
        self._arrivals = 0
        self._flights: dict[int, Flight] = {}
        self._rows: dict[int, int] = {}  # of each step in flight
        self._signs: list[int] = []
        self._next_step = 0
        self.prompt_tokens = 0  # of requests whose rows have begun to run
        self.cached_tokens = 0  # of these, those whose rows did not have to

    @property
    def running(self) -> int:
        """Sequences that hold pages, or may take them."""
        return len(self._seats.running)

    @property
    def waiting(self) -> int:
        """Requests let in that hold nothing: not seated yet, or preempted."""
        return len(self._seats.waiting)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._seats.pool.free

    @property
    def preemptions(self) -> int:
        """How often a sequence had to give its pages up and begin anew."""
        return self._seats.preemptions

    @property
    def rows_abandoned(self) -> int:
        """Rows that ran for attempts that were given up."""
        return self._seats.rows_abandoned

    @property
    def in_flight(self) -> int:
        """Steps planned whose result has not come."""
        return len(self._flights)

    def look_ahead(self, tokens: int) -> None:
        """So many of a sequence may be on their way when a further row of it is planned.

        0 unless the stage that embeds learns of tokens without the Head: as the only one, or from the last.
        """
        self._lookahead = tokens
        self._cohorts = Cohorts(self._micro_batches) if tokens and self._micro_batches > 1 else None

    def admit(self, ticket: Ticket) -> None:
        """Queue the request. Raises OverloadedError when full, RequestError when it can never fit."""
        # The last token is never fed back, so it needs no row.
        need = self._seats.pages_of(len(ticket.prompt_ids) + ticket.max_tokens - 1)
        if need > self._seats.pool.n_pages:
            raise RequestError(
                f"the request may grow to {need * self._seats.page_size} tokens and this pipeline has room for "
                f"{self._seats.pool.n_pages * self._seats.page_size}: ask for fewer tokens or raise pipeline.kv_pages"
            )
        sequence = Sequence.of(ticket, self._arrivals)
        self._arrivals += 1
        self._seats.wait(sequence)
        self._seats.let_in()  # only what cannot run yet counts as waiting
        if not sequence.seated and len(self._seats.waiting) > self._max_waiting:
            self._seats.waiting.remove(sequence)
            raise OverloadedError(f"{self.running} requests run and {len(self._seats.waiting)} wait already")

    def stop(self, seq: int, reason: Literal["stop", "cancelled"]) -> Committed | None:
        """End a sequence now, or when its step in flight is back.

        Returns its end if it ended at once, else None: `apply` will tell. Unknown sequences have ended
        already: None. One that drew, and whose rows are gone or have not all run again, runs them first.
        """
        sequence = self._seats.find(seq)
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
        self._seats.let_in()
        draft = Draft()
        decoding, prompts = self._ready()
        drawing = decoding if self._cohorts is None else self._cohorts.choose(decoding, self._seats.order)
        self._add_decoding(draft, drawing[: self._decoding_share(len(prompts))])
        budget = self._prompt_share(len(draft.flight), len(decoding), prompts)
        for sequence in prompts:
            budget -= self._add_prompt(draft, sequence, budget)
        closes, signs = self._seats.closes, self._signs
        if not draft.flight and not closes and not signs:
            return None
        step = self._next_step
        self._seats.closes, self._signs, self._next_step = [], [], step + 1
        if draft.flight:
            self._flights[step] = draft.flight
            self._rows[step] = sum(draft.counts)
        for sequence in draft.opens:
            if sequence.attempt == 0:
                self.prompt_tokens += sequence.n_prompt
                self.cached_tokens += sequence.cached
        return draft.plan(self._epoch, step, closes, signs)

    def rows_of(self, plan: StepPlan) -> bytes:
        """The token ids of a plan's rows, uint32 little-endian: stage 0's payload."""
        parts: list[int] = []
        for seq, start, count in zip(*(plan.spans[k].tolist() for k in ("seq", "start", "count")), strict=True):
            ids = self._seats.running[seq].tokens[start : start + count]
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
        del self._flights[result.step], self._rows[result.step]
        tokens = iter(result.tokens)
        out: list[Committed] = []
        page_size = self._seats.page_size
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
            if sequence.seated and stop // page_size > sequence.offered:
                self._seats.offer(sequence)
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
        sequence = self._seats.find(seq)
        if sequence is not None:
            self.distrust()
            self._finish(sequence, "error")

    def distrust(self) -> None:
        """Something went wrong, and what pages hold may be why: whoever begins alike must not fail for it for ever."""
        self._seats.distrust()

    def drop_step(self, step: int) -> list[int]:
        """A step failed in some stage: its sequences are dropped. Returns them.

        One preempted since is dropped too: steps behind this one read rows that never were.
        """
        self._rows.pop(step, None)
        dropped = [s.ticket.seq for s, _, _ in self._flights.pop(step, []) if not s.ended]
        for seq in dropped:
            self.drop(seq)
        return dropped

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """What may run, by rank: sequences that draw token after token; those with rows of known tokens left."""
        decoding, prompts, ahead = [], [], self._lookahead
        for sequence in self._seats.order:
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

    def _decoding_share(self, prompts: int) -> int:
        """How many sequences may draw in this step."""
        even = self.running if self._cohorts else math.ceil((self.running - prompts) / self._micro_batches)
        kept = min(self._least_chunk, self._max_step_tokens - 1) if prompts else 0
        return min(even, self._max_step_tokens - kept)

    def _prompt_share(self, added: int, decoding: int, prompts: list[Sequence]) -> int:
        """How many rows of prompts may run in this step, beside so many rows added."""
        if not prompts:
            return 0
        rows = decoding + sum(s.fill - s.computed for s in prompts) + sum(self._rows.values())
        even = math.ceil(rows / self._micro_batches)
        return min(self._max_step_tokens - added, max(even - added, self._least_chunk))

    def _add_decoding(self, draft: Draft, decoding: list[Sequence]) -> None:
        """One row each. Whoever begins a page and finds none stays out."""
        page_size, nothing = self._seats.page_size, list[int]()
        for sequence in decoding:
            if not sequence.seated:
                continue  # preempted by one before it
            new = nothing
            if sequence.computed == len(sequence.pages) * page_size:
                if not self._seats.make_room(sequence, 1, draft.sequences):
                    continue
                new = self._seats.grow(sequence, 1)
            draft.add(sequence, 1, True, new)

    def _add_prompt(self, draft: Draft, sequence: Sequence, budget: int) -> int:
        """Rows of known tokens, as many as budget and pages allow. Returns how many."""
        seats, done = self._seats, sequence.computed
        count = min(sequence.fill - done, budget)
        if count <= 0 or not sequence.seated:
            return 0
        missing = seats.pages_of(done + count) - len(sequence.pages)
        if missing > seats.pool.free and not seats.make_room(sequence, missing, draft.sequences):
            count = min(count, (len(sequence.pages) + seats.pool.free) * seats.page_size - done)
            if count <= 0:
                return 0
        if not sequence.opened and draft.pages and len(draft.pages) + seats.pages_of(done + count) > MAX_ITEMS:
            return 0  # long beginnings that others computed would make the plan too large: in the next one
        new = seats.grow(sequence, seats.pages_of(done + count) - len(sequence.pages))
        draft.add(sequence, count, done + count == sequence.fill and sequence.final is None, new)
        return count

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.ended = True
        if not sequence.seated:
            self._seats.waiting.remove(sequence)
            return
        self._seats.leave(sequence)
        if sequence.opened:
            sealed = reason in ("stop", "length") and sequence.drew  # a client that hung up waits for no receipt
            rows = len(sequence.tokens) - 1 if sequence.drew else sequence.computed
            self._seats.closes.append((sequence.ticket.seq, rows, SEAL if sealed else FORGET))

    def _draws(self, sequence: Sequence) -> bool:
        """Whether a token of a running sequence is on its way."""
        return sequence.seated and sequence.length > len(sequence.tokens)
