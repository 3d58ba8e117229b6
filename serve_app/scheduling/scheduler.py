"""Which rows run next: continuous batching with chunked prefill under a token budget.

Pure: no Ray, no torch, no clock. `admit`, then `plan` / `apply` in turn, with several steps in flight, so that every
stage of a pipeline has work. The chunks of a prompt may be in several steps at a time. A sequence that draws waits
for its token, unless tokens find their own way from where they are drawn to where they are embedded: then with
`lookahead` it also runs the row of the token on its way (DRAWN_LAST), so that no engine waits for the Head; if that
token ends the sequence, such rows are void.
With `speculate` a sequence that says again what it said before guesses its next tokens (scheduling/speculation.py) and
runs their rows at once; it then waits for what is drawn behind each. Rows behind a wrong guess are void, and it goes on
in their place. Steps with prompts, or of many sequences, have no guesses: what they cost is their rows.
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

import itertools
import math
from typing import Literal

import numpy as np

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.request import FinishReason
from serve_app.messages.step import DRAWN_LAST, FORGET, MAX_GUESSES, MAX_ITEMS, SEAL, StepPlan, StepResult
from serve_app.scheduling.cohorts import Cohorts
from serve_app.scheduling.draft import Draft, Flight
from serve_app.scheduling.seats import Seats
from serve_app.scheduling.sequence import Committed, Sequence, Ticket
from serve_app.scheduling.speculation import Guesser, room_for_guesses

__all__ = ["Committed", "Scheduler", "Ticket"]

_RESUMED = 1 << 40  # arrivals by which a request that is resumed goes before all that begin
_CHUNKS = 8  # a pass over the weights for less than this part of the budget costs nearly what the whole would


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
        speculate: int = 0,
    ) -> None:
        """micro_batches: into how many steps rows that could run together are shared out, one for each stage.

        lookahead: tokens that may be on their way when a further row is planned; see look_ahead.
        prefix_cache: the rows of a beginning that lies in some pages already do not run again.
        speculate: how many tokens a sequence may guess in a step, at most MAX_GUESSES; 0: none.
        """
        assert 0 <= speculate <= MAX_GUESSES
        self._epoch = epoch
        self._seats = Seats(n_pages, page_size, max_running, prefix_cache)
        self._max_step_tokens = max_step_tokens
        self._least_chunk = max(1, max_step_tokens // _CHUNKS)
        self._max_waiting = max_waiting
        self._micro_batches = micro_batches
        self._cohorts: Cohorts | None = None
        self.look_ahead(lookahead)
        self._speculate = speculate
        self._arrivals = 0
        self._flights: dict[int, Flight] = {}
        self._rows: dict[int, int] = {}  # of each step in flight
        self._signs: list[int] = []
        self._next_step = 0
        self.prompt_tokens = 0  # of requests whose rows have begun to run
        self.cached_tokens = 0  # of these, those whose rows did not have to
        self.guesses = 0  # rows of guesses that ran, but in attempts given up since
        self.guesses_right = 0  # of these, those that count

    @property
    def running(self) -> int:
        """Sequences that hold pages, or may take them."""
        return len(self._seats.running)

    @property
    def waiting(self) -> int:
        """Requests let in that hold nothing: not seated yet, or preempted."""
        return len(self._seats.waiting)

    @property
    def opened(self) -> set[int]:
        """Sequences that the stages know."""
        return {seq for seq, sequence in self._seats.running.items() if sequence.opened}

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
        """Queue the request. Raises OverloadedError when full, RequestError when it can never fit.

        One that has drawn already is never refused for want of room: it was let in before.
        """
        # The last token is never fed back, so it needs no row.
        need = self._seats.pages_of(len(ticket.prompt_ids) + ticket.max_tokens - 1)
        if need > self._seats.pool.n_pages:
            raise RequestError(
                f"the request may grow to {need * self._seats.page_size} tokens and this pipeline has room for "
                f"{self._seats.pool.n_pages * self._seats.page_size}: ask for fewer tokens or raise pipeline.kv_pages"
            )
        # What was under way before goes before what is new.
        sequence = Sequence.of(ticket, self._arrivals if not ticket.drawn else self._arrivals - _RESUMED)
        if self._speculate and not ticket.sampling.penalises:  # those count what they draw, and void draws would count
            sequence.guesser = Guesser(sequence.n_prompt)
        self._arrivals += 1
        self._seats.wait(sequence)
        self._seats.let_in()  # only what cannot run yet counts as waiting
        if not ticket.drawn and not sequence.seated and len(self._seats.waiting) > self._max_waiting:
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
        share = self._decoding_share(len(prompts))
        for _ in range(1 if self._cohorts is None else self._micro_batches):
            ready = decoding if self._cohorts is None else self._cohorts.choose(decoding, self._seats.order)
            together = share if self._cohorts is None else len(ready)
            most = 0 if prompts else room_for_guesses(self._speculate, together, self._max_step_tokens)
            ready = [s for s in ready if not _waits(s, most)] if self._speculate else ready
            self._add_decoding(draft, ready[:share], most)
            if draft.flight:
                break  # else nobody of this cohort found a page, and one of the next takes theirs
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
            sequence = self._seats.running[seq]
            parts += sequence.tokens[start : start + count] or (DRAWN_LAST,)
            parts += sequence.guesses
        return np.array(parts, "<u4").tobytes()

    def apply(self, result: StepResult) -> list[Committed]:
        """Take in what the last stage drew; ended sequences give their pages back and are to be closed.

        Raises ProtocolError for a step not in flight or another number of tokens than it asked for; then
        nothing changed.
        """
        flight = self._flights.get(result.step)
        if flight is None:
            raise ProtocolError(f"step {result.step} was answered, which is not in flight")
        asked = sum(draws for _, draws, _ in flight)
        if len(result.tokens) != asked:
            raise ProtocolError(f"step {result.step} asked for {asked} tokens and got {len(result.tokens)}")
        del self._flights[result.step], self._rows[result.step]
        tokens = iter(result.tokens)
        out: list[Committed] = []
        page_size = self._seats.page_size
        for sequence, draws, stop in flight:
            sequence.flights -= 1
            sequence.done = stop
            drawn = list(itertools.islice(tokens, draws))
            if sequence.ended:
                continue  # while this step ran: its rows are void
            if sequence.final is not None:
                drawn = []  # it was known already where the answer ends
            if drawn:
                drawn = sequence.take(drawn)
            elif sequence.ending is not None:
                sequence.final = sequence.ending
            if draws > 1:
                self._drop_void(sequence)
            if sequence.seated and sequence.done // page_size > sequence.offered:
                self._seats.offer(sequence)
            reason = sequence.final
            if reason is not None and not (sequence.seated and (reason == "cancelled" or sequence.is_whole)):
                reason = None  # preempted, or running anew: its rows must run for the receipt
            out += (Committed(sequence.ticket.seq, token, None) for token in drawn[:-1])
            if drawn or reason is not None:
                last = drawn[-1] if drawn else None
                out.append(Committed(sequence.ticket.seq, last, reason, sequence.attempt))
            if reason is not None:
                self._finish(sequence, reason)
        return out

    def sign(self, seq: int) -> None:
        """Every stage's roots of this closed sequence match: have them sign."""
        self._signs.append(seq)

    def restart(self, epoch: int) -> list[Committed]:
        """The stages have forgotten all they knew: what has begun begins anew. Returns what ends instead.

        Nothing drawn is lost, and nothing of the epoch before is answered any more.
        """
        self._epoch = epoch
        self._flights.clear()
        self._rows.clear()
        self._signs.clear()
        self._seats.clear()
        over = []
        for sequence in list(self._seats.waiting):
            ending, sequence.ending = sequence.ending, None
            if ending is not None and (ended := self.stop(sequence.ticket.seq, ending)) is not None:
                over.append(ended)
        return over

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

    def _add_decoding(self, draft: Draft, decoding: list[Sequence], most: int) -> None:
        """One row each, and up to `most` guesses. Whoever begins a page and finds none stays out."""
        page_size, nothing = self._seats.page_size, list[int]()
        for sequence in decoding:
            if not sequence.seated:
                continue  # preempted by one before it
            new = nothing
            if sequence.computed == len(sequence.pages) * page_size:
                if not self._seats.make_room(sequence, 1, draft.sequences):
                    continue
                new = self._seats.grow(sequence, 1)
            guesses = sequence.guessed(most) if most else nothing
            if guesses:
                # Never a page that somebody needs for a row that counts: one for each that runs stays free.
                missing = self._seats.pages_of(sequence.computed + 1 + len(guesses)) - len(sequence.pages)
                spare = max(self._seats.pool.free - self.running, 0)
                new = new + self._seats.grow(sequence, max(min(missing, spare), 0))
                guesses = guesses[: len(sequence.pages) * page_size - sequence.computed - 1]
            draft.add(sequence, 1, True, new, guesses)

    def _drop_void(self, sequence: Sequence) -> None:
        """A step with guesses is back: only rows of tokens that it has now count."""
        guesses, sequence.guesses = sequence.guesses, ()
        if not sequence.seated:
            return  # preempted: no row of that attempt counts any more
        run, sequence.length = sequence.done, len(sequence.tokens)
        sequence.computed = sequence.done = min(run, sequence.length - 1)
        self.guesses += len(guesses)
        self.guesses_right += len(guesses) - (run - sequence.done)

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


def _waits(sequence: Sequence, most: int) -> bool:
    """Whether one that could run must first know what it drew: it made guesses, or is about to."""
    return bool(sequence.guesses) or (most > 0 and sequence.length > len(sequence.tokens) and sequence.guessing)
