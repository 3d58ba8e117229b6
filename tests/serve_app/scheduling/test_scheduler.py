"""Laws of the scheduler, over random courses of requests, stops and steps in flight."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.request import Sampling
from serve_app.messages.step import DRAWN_LAST, StepPlan, StepResult
from serve_app.scheduling.scheduler import Scheduler, Ticket

STOP = 9


def ticket(seq: int, prompt: int, max_tokens: int) -> Ticket:
    return Ticket(seq, bytes(32), tuple(range(10, 10 + prompt)), max_tokens, Sampling(0), bytes(8), frozenset([STOP]))


def scheduler(**changes: int) -> Scheduler:
    limits = {
        "epoch": 1,
        "n_pages": 40,
        "page_size": 4,
        "max_step_tokens": 8,
        "max_running": 5,
        "max_waiting": 100,
        "micro_batches": 2,
    }
    return Scheduler(**(limits | changes))


class Drive:
    """Runs a scheduler to its end and checks on every plan what must hold for each.

    Answers as the stages would: the ids of a plan's rows are taken in turn, DRAWN_LAST being what was drawn last.
    """

    def __init__(
        self, under_test: Scheduler, draw: random.Random, flights: int, budget: int = 8, lookahead: int = 0
    ) -> None:
        self.scheduler, self.draw, self.flights, self.budget = under_test, draw, flights, budget
        self.lookahead = lookahead
        self.running: dict[int, list[int]] = {}  # ids that have run, by open sequence
        self.pages: dict[int, list[int]] = {}
        self.drawn: dict[int, list[int]] = {}  # by the stages
        self.ended: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}  # committed
        self.sent: list[tuple[StepPlan, tuple[int, ...]]] = []

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
            assert committed.seq not in self.ended
            if committed.token is not None:
                self.tokens.setdefault(committed.seq, []).append(committed.token)
            if committed.reason is not None:
                self.ended[committed.seq] = committed.reason
        return True

    def check(self, plan: StepPlan) -> tuple[int, ...]:
        """What the stages do with the plan; the tokens they draw."""
        assert plan.rows <= self.budget
        ids = np.frombuffer(self.scheduler.rows_of(plan), "<u4").tolist()
        assert len(ids) == plan.rows
        for seq in plan.opens["seq"].tolist():
            assert seq not in self.running
            self.running[seq], self.pages[seq], self.drawn[seq] = [], [], []
        page, row, tokens = 0, 0, []
        for seq, start, count, new, sample in plan.spans.tolist():
            assert start == len(self.running[seq]), "a gap or an overlap"
            for id in ids[row : row + count]:
                if id == DRAWN_LAST:
                    assert self.lookahead and count == 1, "a token is not waited for"
                    id = self.drawn[seq][-1]
                self.running[seq].append(id)
            row += count
            self.pages[seq] += plan.pages[page : page + new].tolist()
            page += new
            assert len(self.pages[seq]) == -(-len(self.running[seq]) // 4)
            if sample:
                tokens.append(self.draw.choice([STOP, 1, 2, 3, 4, 5]))
                self.drawn[seq].append(tokens[-1])
        for seq, rows, seal in plan.closes.tolist():
            ran = self.running.pop(seq)
            assert rows <= len(ran) and (len(ran) - rows <= self.lookahead or not seal)
            if seal:
                # What is hashed and signed: the prompt and every committed token but the last.
                committed = self.tokens[seq]
                assert ran[rows - len(committed) + 1 : rows] == committed[:-1]
                assert self.drawn[seq][: len(committed)] == committed
            del self.pages[seq]
        held = [p for pages in self.pages.values() for p in pages]
        assert len(held) == len(set(held)), "a page held by two sequences"
        assert len(self.running) <= 5 + self.flights
        return tuple(tokens)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=14),
    stops=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 13), st.booleans()), max_size=8),
    flights=st.integers(1, 4),
    lookahead=st.integers(0, 2),
    seed=st.integers(0, 1 << 30),
)
def test_every_request_ends_once_and_all_pages_come_back(
    requests: list[tuple[int, int]], stops: list[tuple[int, int, bool]], flights: int, lookahead: int, seed: int
) -> None:
    """Whatever is stopped whenever: no page is lost, no row runs twice, none is forgotten."""
    if lookahead:
        under_test = scheduler(lookahead=lookahead, micro_batches=1)
        drive = Drive(under_test, random.Random(seed), flights, lookahead=lookahead)
    else:
        drive = Drive(scheduler(), random.Random(seed), flights)
    for seq, (prompt, max_tokens) in enumerate(requests):
        drive.scheduler.admit(ticket(seq, prompt, max_tokens))
    for turn in range(2000):
        for _, seq, keep in (s for s in stops if s[0] == turn):
            ended = drive.scheduler.stop(seq, "stop" if keep else "cancelled")
            if ended is not None:
                assert seq not in drive.ended
                drive.ended[seq] = str(ended.reason)
        if not drive.step() and turn > 60:
            break
    assert set(drive.ended) == set(range(len(requests)))
    assert drive.scheduler.free_pages == 40
    assert drive.scheduler.running == drive.scheduler.waiting == drive.scheduler.in_flight == 0
    for seq, (_, max_tokens) in enumerate(requests):
        assert len(drive.tokens.get(seq, ())) <= max_tokens


def test_an_answer_has_exactly_max_tokens_unless_a_stop_id_came() -> None:
    s = scheduler()
    s.admit(ticket(0, 3, 4))
    reasons = []
    for _ in range(4):
        plan = s.plan()
        assert plan is not None
        reasons += [c.reason for c in s.apply(StepResult(1, plan.step, (1,)))]
    assert reasons == [None, None, None, "length"]


def test_with_lookahead_the_next_row_is_planned_before_its_token_is_known_but_never_beyond_max_tokens() -> None:
    s = scheduler(lookahead=1, micro_batches=1)
    s.admit(ticket(0, 3, 2))
    first, second = s.plan(), s.plan()
    assert first is not None and second is not None and s.plan() is None
    assert np.frombuffer(s.rows_of(second), "<u4").tolist() == [DRAWN_LAST]
    assert [c.reason for c in s.apply(StepResult(1, first.step, (1,)))] == [None]
    assert [c.reason for c in s.apply(StepResult(1, second.step, (2,)))] == ["length"]


def test_a_stop_token_makes_the_row_after_it_void() -> None:
    """It ran already: it is not among the rows that count, and what it drew is nobody's."""
    s = scheduler(lookahead=1, micro_batches=1)
    s.admit(ticket(0, 3, 9))
    first, second = s.plan(), s.plan()
    assert first is not None and second is not None
    assert [c.reason for c in s.apply(StepResult(1, first.step, (STOP,)))] == ["stop"]
    assert s.free_pages == 40
    closing = s.plan()
    assert closing is not None and closing.closes.tolist() == [(0, 3, 1)]
    assert s.apply(StepResult(1, second.step, (5,))) == []


def test_the_chunks_of_a_prompt_are_in_flight_together() -> None:
    s = scheduler(micro_batches=1)
    s.admit(ticket(0, 20, 2))
    plans = [s.plan() for _ in range(4)]
    assert [p.spans.tolist() for p in plans if p] == [[(0, 0, 8, 2, 0)], [(0, 8, 8, 2, 0)], [(0, 16, 4, 1, 1)]]


def test_decoding_rows_go_before_prefill_and_the_rest_of_the_budget_is_filled() -> None:
    """A long prompt delays nobody's next token by more than one budget."""
    s = scheduler(micro_batches=1)
    s.admit(ticket(0, 2, 10))
    first = s.plan()
    assert first is not None
    s.apply(StepResult(1, first.step, (1,)))
    s.admit(ticket(1, 30, 2))
    plan = s.plan()
    assert plan is not None
    assert [(int(x["seq"]), int(x["count"]), int(x["sample"])) for x in plan.spans] == [(0, 1, 1), (1, 7, 0)]


def test_a_large_request_is_not_starved_by_small_ones_behind_it() -> None:
    """First come, first served: what does not fit now is not overtaken."""
    s = scheduler(n_pages=4)
    s.admit(ticket(0, 8, 5))  # 3 pages
    s.admit(ticket(1, 12, 5))  # 4 pages: must wait for all
    s.admit(ticket(2, 1, 1))  # 1 page, free now
    plan = s.plan()
    assert plan is not None and plan.opens["seq"].tolist() == [0]
    assert (s.running, s.waiting) == (1, 2)


def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="room for 160"):
        scheduler().admit(ticket(0, 100, 100))


def test_a_full_queue_says_so() -> None:
    """Waiting is what cannot run yet: with no place to wait, one may still run."""
    s = scheduler(max_waiting=0, max_running=1)
    s.admit(ticket(0, 1, 1))
    with pytest.raises(OverloadedError, match="1 requests run and 0 wait"):
        s.admit(ticket(1, 1, 1))
    assert (s.running, s.waiting) == (1, 0)


def test_a_step_that_fails_takes_only_its_own_sequences_along() -> None:
    s = scheduler(micro_batches=2)
    for seq in (0, 1):
        s.admit(ticket(seq, 3, 4))
    first, second = s.plan(), s.plan()
    assert first is not None and second is not None
    assert s.drop_step(first.step) == [0]
    assert [c.seq for c in s.apply(StepResult(1, second.step, (1,)))] == [1]
    closing = s.plan()
    assert closing is not None and closing.closes["seal"].tolist() == [0]


def test_only_answers_with_tokens_that_someone_waits_for_are_sealed() -> None:
    """A hang-up needs no receipt; a stop string's answer does."""
    for reason, seal in (("stop", 1), ("cancelled", 0)):
        s = scheduler()
        s.admit(ticket(0, 3, 9))
        plan = s.plan()
        assert plan is not None
        s.apply(StepResult(1, plan.step, (1,)))
        s.stop(0, reason)  # type: ignore[arg-type]
        closing = s.plan()
        assert closing is not None and closing.closes["seal"].tolist() == [seal]


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2, 3)])
def test_an_answer_with_too_few_or_too_many_tokens_is_refused_and_changes_nothing(tokens: tuple[int, ...]) -> None:
    """The last stage may be another's machine: what it says is counted before it is believed."""
    s = scheduler(micro_batches=1)
    for seq in (0, 1):
        s.admit(ticket(seq, 3, 4))
    plan = s.plan()
    assert plan is not None and plan.spans["sample"].tolist() == [1, 1]
    with pytest.raises(ProtocolError, match=f"2 tokens and got {len(tokens)}"):
        s.apply(StepResult(1, plan.step, tokens))
    assert s.in_flight == 1
    assert [c.token for c in s.apply(StepResult(1, plan.step, (4, 5)))] == [4, 5]


def test_nobody_is_passed_over_for_ever_when_more_decode_than_fit_in_a_step() -> None:
    """max_step_tokens below max_running: the oldest go first, and all end."""
    s = scheduler(max_step_tokens=2, micro_batches=1)
    for seq in range(5):
        s.admit(ticket(seq, 3, 6))
    drive = Drive(s, random.Random(0), flights=1, budget=2)
    while drive.step():
        pass
    assert set(drive.ended) == set(range(5)) and s.free_pages == 40
