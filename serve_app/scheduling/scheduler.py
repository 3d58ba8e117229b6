"""Which rows run next: continuous batching with chunked prefill under a token budget.

Pure: no Ray, no torch, no clock. `admit`, then `plan` / `apply` in turn, with several steps in flight, so that every
stage of a pipeline has work. The chunks of a prompt may be in several steps at a time. A sequence that draws waits
for its token, unless one engine both draws and embeds: then with `lookahead` it also runs the row of the token on its
way (DRAWN_LAST), so that the engine never waits for the Head; if that token ends the sequence, such rows are void.
Requests join and leave between any two steps. A request is let in when pages for its longest course can be promised:
one that runs never waits for pages. Decoding rows go first, then prefill chunks fill the budget, oldest request first.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.controls import Controls
from serve_app.messages.request import FinishReason, Sampling
from serve_app.messages.step import CLOSE, DRAWN_LAST, OPEN, SPAN, StepPlan, StepResult
from serve_app.scheduling.pages import PagePool


def max_flights(stages: int) -> int:
    """Steps on their way at a time: one more than stages keeps each busy while tokens travel back."""
    return stages + 1 + lookahead(stages) // 2


def lookahead(stages: int) -> int:
    """For a pipeline of so many stages. Two tokens ahead hide the Head even where a step takes a millisecond."""
    return 2 if stages == 1 else 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request as the scheduler needs it. seq: the Head's number for it, never reused."""

    seq: int
    request_hash: bytes
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    sampling_key: bytes
    stop_ids: frozenset[int]


class Committed(NamedTuple):
    """What a step gave one sequence. token None: nothing was drawn. reason None: it goes on."""

    seq: int
    token: int | None
    reason: FinishReason | None


@dataclass(slots=True)
class _Sequence:
    ticket: Ticket
    tokens: list[int]  # prompt, then what was drawn
    n_prompt: int
    limit: int  # tokens at most
    length: int  # tokens, those on their way counted
    promised: int  # pages set aside and not yet taken
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # rows that have run, or run in a step in flight
    opened: bool = False
    flights: int = 0  # steps on their way that hold rows of it
    ending: Literal["stop", "cancelled"] | None = None
    ended: bool = False

    @classmethod
    def of(cls, ticket: Ticket, promised: int) -> _Sequence:
        n = len(ticket.prompt_ids)
        return cls(ticket, list(ticket.prompt_ids), n, n + ticket.max_tokens, n, promised)


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
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._flights: dict[int, list[tuple[_Sequence, bool]]] = {}  # step -> its sequences, sampled or not
        self._closes: list[tuple[int, int, bool]] = []  # seq, rows, seal
        self._signs: list[int] = []
        self._next_step = 0

    @property
    def running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests let in that hold nothing yet."""
        return len(self._waiting)

    @property
    def free_pages(self) -> int:
        """Pages neither held nor promised."""
        return self._pool.free

    @property
    def in_flight(self) -> int:
        """Steps planned whose result has not come."""
        return len(self._flights)

    def admit(self, ticket: Ticket) -> None:
        """Queue the request. Raises OverloadedError when full, RequestError when it can never fit."""
        need = self._pages_for(ticket)
        if need > self._pool.n_pages:
            raise RequestError(
                f"the request may grow to {need * self._page_size} tokens and this pipeline has room for "
                f"{self._pool.n_pages * self._page_size}: ask for fewer tokens or raise pipeline.kv_pages"
            )
        self._waiting.append(_Sequence.of(ticket, need))
        self._let_in()  # only what cannot run yet counts as waiting
        if len(self._waiting) > self._max_waiting:
            self._waiting.pop()
            raise OverloadedError(f"{self.running} requests run and {len(self._waiting)} wait already")

    def stop(self, seq: int, reason: Literal["stop", "cancelled"]) -> Committed | None:
        """End a sequence now, or when its step in flight is back.

        Returns its end if it ended at once, else None: `apply` will tell. Unknown sequences have ended
        already: None.
        """
        for waiting in self._waiting:
            if waiting.ticket.seq == seq:
                self._waiting.remove(waiting)
                return Committed(seq, None, "cancelled")
        sequence = self._running.get(seq)
        if sequence is None:
            return None
        if sequence.flights:
            sequence.ending = reason
            return None
        self._finish(sequence, reason)
        return Committed(seq, None, reason)

    def plan(self) -> StepPlan | None:
        """The next micro-batch, or None if nothing can run and nothing is to be closed or signed."""
        self._let_in()
        opens: list[_Sequence] = []
        flight: list[tuple[_Sequence, bool]] = []
        starts: list[int] = []
        counts: list[int] = []
        page_counts: list[int] = []
        pages: list[int] = []
        decoding, prompts = self._ready()
        # An equal share for every micro-batch in flight: a front-loaded first one leaves the others' stages idle.
        quota = math.ceil(len(self._running) / self._micro_batches)
        budget = self._max_step_tokens
        for sequence in decoding[: min(quota, budget)]:
            start = sequence.computed
            new = self._grow(sequence, start + 1) if start == len(sequence.pages) * self._page_size else []
            starts.append(start)
            counts.append(1)
            page_counts.append(len(new))
            pages += new
            sequence.computed = start + 1
            sequence.length += 1
            sequence.flights += 1
            flight.append((sequence, True))
        budget -= len(flight)
        for sequence in prompts[: quota - len(flight)]:
            start = sequence.computed
            count = min(sequence.n_prompt - start, budget)
            if count <= 0:
                break
            budget -= count
            new = self._grow(sequence, start + count)
            starts.append(start)
            counts.append(count)
            page_counts.append(len(new))
            pages += new
            if not sequence.opened:
                sequence.opened = True
                opens.append(sequence)
            sequence.computed = start + count
            sample = sequence.computed == sequence.n_prompt
            sequence.length += sample
            sequence.flights += 1
            flight.append((sequence, sample))
        if not flight and not self._closes and not self._signs:
            return None
        spans = np.zeros(len(flight), SPAN)
        spans["seq"] = [sequence.ticket.seq for sequence, _ in flight]
        spans["sample"] = [sample for _, sample in flight]
        spans["start"], spans["count"], spans["new_pages"] = starts, counts, page_counts
        plan = StepPlan(
            self._epoch,
            self._next_step,
            np.array([_open(s.ticket) for s in opens], OPEN),
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

    def _ready(self) -> tuple[list[_Sequence], list[_Sequence]]:
        """What may run, oldest first: sequences that draw token after token; those with rows of their prompt left."""
        decoding, prompts, ahead = [], [], self._lookahead
        for sequence in self._running.values():
            if sequence.ending is not None:
                continue
            length = sequence.length
            if length == sequence.n_prompt:
                prompts.append(sequence)
            elif length < sequence.limit and length - len(sequence.tokens) <= ahead:
                decoding.append(sequence)
        return decoding, prompts

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
        asked = sum(sampled for _, sampled in flight)
        if len(result.tokens) != asked:
            raise ProtocolError(f"step {result.step} asked for {asked} tokens and got {len(result.tokens)}")
        del self._flights[result.step]
        tokens = iter(result.tokens)
        out: list[Committed] = []
        for sequence, sampled in flight:
            sequence.flights -= 1
            token = next(tokens) if sampled else None
            if sequence.ended:
                continue  # while this step ran: its rows are void
            reason: FinishReason | None = sequence.ending
            if token is not None:
                sequence.tokens.append(token)
                if reason is None and token in sequence.ticket.stop_ids:
                    reason = "stop"
                if reason is None and len(sequence.tokens) >= sequence.limit:
                    reason = "length"
                out.append(Committed(sequence.ticket.seq, token, reason))
            elif reason is not None:
                out.append(Committed(sequence.ticket.seq, None, reason))
            if reason is not None:
                self._finish(sequence, reason)
        return out

    def sign(self, seq: int) -> None:
        """Every stage's roots of this closed sequence match: have them sign."""
        self._signs.append(seq)

    def drop(self, seq: int) -> None:
        """A sequence whose step will never come back: free its pages and tell the stages to forget it."""
        for waiting in [s for s in self._waiting if s.ticket.seq == seq]:
            self._waiting.remove(waiting)
        sequence = self._running.get(seq)
        if sequence is not None:
            self._finish(sequence, "error")

    def drop_step(self, step: int) -> list[int]:
        """A step failed in some stage: its sequences are dropped. Returns them."""
        dropped = [s.ticket.seq for s, _ in self._flights.pop(step, []) if not s.ended]
        for seq in dropped:
            self.drop(seq)
        return dropped

    def _let_in(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            if not self._pool.promise(self._waiting[0].promised):
                return  # first come, first served: a smaller request behind it must not starve it
            sequence = self._waiting.popleft()
            self._running[sequence.ticket.seq] = sequence

    def _grow(self, sequence: _Sequence, rows: int) -> list[int]:
        new = self._pool.take(-(-rows // self._page_size) - len(sequence.pages))
        sequence.pages += new
        sequence.promised -= len(new)
        return new

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        # Stages work through messages in order, so a page given back here is rewritten only after every
        # step that read it has run.
        del self._running[sequence.ticket.seq]
        sequence.ended = True
        self._pool.give_back(sequence.pages, sequence.promised)
        if sequence.opened:
            drew = len(sequence.tokens) > sequence.n_prompt
            seal = reason in ("stop", "length") and drew  # a client that hung up waits for no receipt
            rows = len(sequence.tokens) - 1 if drew else sequence.computed
            self._closes.append((sequence.ticket.seq, rows, seal))

    def _pages_for(self, ticket: Ticket) -> int:
        # The last token is never fed back, so it needs no row.
        return -(-(len(ticket.prompt_ids) + ticket.max_tokens - 1) // self._page_size)


def _open(ticket: Ticket) -> tuple[object, ...]:
    sampling = ticket.sampling
    return (
        ticket.seq,
        np.frombuffer(ticket.request_hash, "u1"),
        np.frombuffer(ticket.sampling_key, "u1"),
        sampling.temperature_micro,
        sampling.top_k,
        sampling.top_p_micro,
    )
