"""A scheduler driven to its end, with stages that answer as real ones would; every plan is checked on the way."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Collection

import numpy as np
from hypothesis import strategies as st

from serve_app.messages.request import Sampling
from serve_app.messages.step import ABANDON, DRAW_EACH, DRAWN_LAST, MAX_GUESSES, NO_DRAW, SEAL, StepPlan, StepResult
from serve_app.scheduling.scheduler import Committed, Scheduler, Ticket

STOP = 9
PAGE = 4


def prompt_of(seq: int, n: int) -> tuple[int, ...]:
    """Requests of one kind (seq % 3) share their beginnings."""
    return tuple(10 + (7 * i + seq % 3) % 50 for i in range(n))


def ticket(seq: int, prompt: int, max_tokens: int, priority: int = 0, salt: bytes = b"") -> Ticket:
    ids, stop_ids = prompt_of(seq, prompt), frozenset([STOP])
    return Ticket(seq, bytes(32), ids, max_tokens, Sampling(0), bytes(8), stop_ids, priority, salt)


def scheduler(**changes: int) -> Scheduler:
    limits = {
        "epoch": 1,
        "n_pages": 40,
        "page_size": PAGE,
        "max_step_tokens": 8,
        "max_running": 5,
        "max_waiting": 100,
        "micro_batches": 2,
    }
    return Scheduler(**(limits | changes))


Model = Callable[[list[int]], int]


def next_token(known: list[int]) -> int:
    """The stages of these tests: a function of all tokens so far."""
    return STOP if (drawn := zlib.crc32(bytes(known)) % 40) == 0 else 100 + drawn


def repeating(surprises: int) -> Model:
    """Stages that say again what stood five tokens before, but for so many tokens of sixteen."""

    def model(known: list[int]) -> int:
        surprised = len(known) < 5 or zlib.crc32(bytes(known[-20:])) // 64 % 16 < surprises
        return next_token(known) if surprised else known[-5]

    return model


def answer_of(asked: Ticket, model: Model = next_token) -> list[int]:
    """What a request must be answered, whatever runs beside it."""
    known = list(asked.prompt_ids)
    while len(known) < len(asked.prompt_ids) + asked.max_tokens:
        known.append(model(known))
        if known[-1] == STOP:
            break
    return known[len(asked.prompt_ids) :]


class Drive:
    """Runs a scheduler to its end and checks on every plan what must hold for each.

    Answers as the stages would: they keep the ids of rows in the pages that they are told, read what the pages of a
    sequence hold, and draw next_token of that. So a page that two write to, or that was taken too early, shows.
    """

    def __init__(
        self,
        under_test: Scheduler,
        flights: int,
        budget: int = 8,
        lookahead: int = 0,
        cache: bool = False,
        *,
        guesses: int = 0,
        model: Model = next_token,
        page_size: int = PAGE,
    ) -> None:
        self.scheduler, self.flights, self.budget, self.cache = under_test, flights, budget, cache
        self.n_cached = 0
        self.lookahead, self.guesses, self.model, self.page_size = lookahead, guesses, model, page_size
        self.tickets: dict[int, Ticket] = {}
        self.kv: dict[tuple[int, int], int] = {}  # page and place in it -> token id
        self.ran: dict[int, list[int]] = {}  # ids of the rows that have run, as a witness sees them, by open sequence
        self.pages: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}  # the token drawn last
        self.guessed: dict[int, int] = {}  # how many of the rows that ran, at their end, may turn out void
        self.attempts: dict[int, int] = {}
        self.ended: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}  # committed
        self.sent: list[tuple[StepPlan, tuple[int, ...]]] = []

    def admit(self, asked: Ticket) -> None:
        self.tickets[asked.seq] = asked
        self.tokens[asked.seq] = []
        self.scheduler.admit(asked)

    def stop(self, seq: int, keep: bool) -> None:
        ended = self.scheduler.stop(seq, "stop" if keep else "cancelled")
        if ended is not None:
            self.take(ended)

    def step(self) -> bool:
        """Plan what can be planned, then answer one step. False when nothing is left to do."""
        while self.scheduler.in_flight < self.flights and (plan := self.scheduler.plan()) is not None:
            tokens = self.check(plan)
            if plan.rows:
                self.sent.append((plan, tokens))
        if not self.sent:
            return False
        plan, tokens = self.sent.pop(0)
        for committed in self.scheduler.apply(StepResult(1, plan.step, tokens)):
            self.take(committed)
        return True

    def restart(self) -> None:
        """The stages are replaced: what is on its way is lost, and they know nothing any more."""
        self.sent.clear()
        for seq in self.ran.keys() - self.ended.keys():
            self.attempts[seq] = self.attempts.get(seq, 0) + 1
        for held in (self.kv, self.ran, self.pages, self.last, self.guessed):
            held.clear()
        for committed in self.scheduler.restart(2):
            self.take(committed)
        assert self.scheduler.running == self.scheduler.in_flight == 0

    def take(self, committed: Committed) -> None:
        seq, token, reason, attempt = committed
        assert seq not in self.ended
        if token is not None:
            self.tokens[seq].append(token)
        if reason is not None:
            self.ended[seq] = reason
            assert attempt == self.attempts.get(seq, 0)

    def check(self, plan: StepPlan) -> tuple[int, ...]:
        """What the stages do with the plan; the tokens they draw."""
        assert plan.rows <= self.budget
        ids = np.frombuffer(self.scheduler.rows_of(plan), "<u4").tolist()
        assert len(ids) == plan.rows
        cached = dict(plan.opens[["seq", "cached"]].tolist())
        for seq, attempt in plan.opens[["seq", "attempt"]].tolist():
            assert seq not in self.ran and attempt == self.attempts.get(seq, 0)
            self.ran[seq], self.pages[seq] = [], []
            self.last.pop(seq, None)
            self.guessed.pop(seq, None)
        page, row, asked, resolved = 0, 0, [], list[int]()
        for seq, start, count, new, sample in plan.spans.tolist():
            self.pages[seq] += plan.pages[page : page + new].tolist()
            page += new
            if seq in cached:  # a witness knows what the pages hold; so must the Head
                assert cached[seq] % self.page_size == 0
                self.ran[seq] = self.held(seq, cached[seq])
                self.n_cached += cached[seq]
            n_ran, void = len(self.ran[seq]), self.guessed.pop(seq, 0)
            assert n_ran - void <= start <= n_ran, "a gap or an overlap"
            del self.ran[seq][start:]
            beyond = len(self.pages[seq]) - -(-(start + count) // self.page_size)
            assert 0 <= beyond <= (-(-MAX_GUESSES // self.page_size) if self.guesses else 0)
            for position, id in enumerate(ids[row : row + count], start):
                if id == DRAWN_LAST:
                    assert self.lookahead and count == 1, "a token is not waited for"
                    id = self.last[seq]
                self.kv[self.pages[seq][position // self.page_size], position % self.page_size] = id
                self.ran[seq].append(id)
                resolved.append(id)
            row += count
            if sample == DRAW_EACH:
                assert 2 <= count <= 1 + self.guesses and seq not in cached
                self.guessed[seq] = count - 1
            if sample != NO_DRAW:
                asked += [(seq, n) for n in range(start + count - self.guessed.get(seq, 0), start + count + 1)]
        drawn = []
        for seq, n in asked:  # after every row of the step is in its page
            known = self.held(seq, len(self.ran[seq]))
            assert known == self.ran[seq], "another wrote to its pages"
            assert known[: len(self.tickets[seq].prompt_ids)] == list(self.tickets[seq].prompt_ids)
            drawn.append(self.model(known[:n]))
            self.last[seq] = drawn[-1]
        for seq in self.guessed:
            self.last.pop(seq, None)  # an engine does not know which of them it was
        for seq, rows, seal in plan.closes.tolist():
            if seal == SEAL:
                # What is hashed and signed: the prompt and every committed token but the last.
                prompt, committed = list(self.tickets[seq].prompt_ids), self.tokens[seq]
                assert rows == len(prompt) + len(committed) - 1
                assert self.ran[seq][:rows] == prompt + committed[:-1]
                # One that was begun anew, and stopped while its rows ran again: what it drew behind them is void too.
                behind = self.lookahead + (self.attempts.get(seq, 0) > 0)
                assert len(self.ran[seq]) - rows <= max(behind, self.guessed.get(seq, 0))
            if seal == ABANDON:
                assert 0 <= len(self.ran[seq]) - rows <= self.guessed.get(seq, 0)
                self.attempts[seq] = self.attempts.get(seq, 0) + 1
            del self.ran[seq], self.pages[seq]
        self.check_pages()
        self.saw(plan, resolved, drawn)
        assert len(self.ran) <= 5 + self.flights
        return tuple(drawn)

    def saw(self, plan: StepPlan, rows: list[int], drawn: list[int]) -> None:
        """The step has run; rows: the ids of its rows; drawn: its tokens. For whoever watches."""

    def check_pages(self) -> None:
        """A page of several sequences holds rows of all of them; nobody runs a row into it any more."""
        shared = collections.Counter(p for pages in self.pages.values() for p in pages)
        for seq, pages in self.pages.items():
            for i, page in enumerate(pages):
                if shared[page] > 1:
                    counted = len(self.ran[seq]) - self.guessed.get(seq, 0)
                    assert self.cache and (i + 1) * self.page_size <= counted, "a page held by two sequences"
                    for place in range(self.page_size):
                        assert self.kv[page, place] == self.ran[seq][i * self.page_size + place]

    def held(self, seq: int, rows: int) -> list[int]:
        """What its pages hold in the place of its first rows."""
        size = self.page_size
        return [self.kv[self.pages[seq][i // size], i % size] for i in range(rows)]


Course = tuple[list[tuple[int, int, int, int]], list[tuple[int, int, bool]]]
REQUESTS = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 25), st.integers(-1, 1))
COURSES = st.tuples(
    st.lists(REQUESTS, min_size=1, max_size=14),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 13), st.booleans()), max_size=8),
)  # requests: turn, length of the prompt, tokens at most, priority; stops: turn, seq, keep


def follow(course: Course, drive: Drive, restarts: Collection[int] = ()) -> None:
    """Every request ends, once, with the answer it has when it runs alone, or its beginning if it was stopped.

    restarts: turns at which the stages are lost.
    """
    requests, stops = course
    arriving = [(turn, ticket(seq, *rest)) for seq, (turn, *rest) in enumerate(requests)]
    for turn in range(4000):
        for _, asked in (a for a in arriving if a[0] == turn):
            drive.admit(asked)
        for _, seq, keep in (s for s in stops if s[0] == turn):
            drive.stop(seq, keep)
        if turn in restarts:
            drive.restart()
        if not drive.step() and turn > 80:
            break
    assert set(drive.ended) == set(range(len(requests)))
    s = drive.scheduler
    assert s.running == s.waiting == s.in_flight == len(drive.ran) == 0
    for seq, asked in drive.tickets.items():
        whole, got = answer_of(asked, drive.model), drive.tokens[seq]
        assert got == whole[: len(got)]
        if not any(seq == stopped for _, stopped, _ in stops):
            assert got == whole and drive.ended[seq] == ("stop" if whole[-1] == STOP else "length")
