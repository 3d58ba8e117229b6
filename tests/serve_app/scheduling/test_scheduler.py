"""Laws of the scheduler, over random courses of requests, stops and steps in flight."""

from __future__ import annotations

import collections
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import OverloadedError, ProtocolError, RequestError
from serve_app.messages.request import Sampling
from serve_app.messages.step import ABANDON, DRAWN_LAST, SEAL, StepPlan, StepResult
from serve_app.scheduling.pages import PagePool, no_page, page_names
from serve_app.scheduling.scheduler import Committed, Scheduler, Ticket
from serve_app.scheduling.sequence import LEVEL_ARRIVALS

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


def next_token(known: list[int]) -> int:
    """The stages of these tests: a function of all tokens so far."""
    return STOP if (drawn := zlib.crc32(bytes(known)) % 40) == 0 else 100 + drawn


def answer_of(asked: Ticket) -> list[int]:
    """What a request must be answered, whatever runs beside it."""
    known = list(asked.prompt_ids)
    while len(known) < len(asked.prompt_ids) + asked.max_tokens:
        known.append(next_token(known))
        if known[-1] == STOP:
            break
    return known[len(asked.prompt_ids) :]


class Drive:
    """Runs a scheduler to its end and checks on every plan what must hold for each.

    Answers as the stages would: they keep the ids of rows in the pages that they are told, read what the pages of a
    sequence hold, and draw next_token of that. So a page that two write to, or that was taken too early, shows.
    """

    def __init__(
        self, under_test: Scheduler, flights: int, budget: int = 8, lookahead: int = 0, cache: bool = False
    ) -> None:
        self.scheduler, self.flights, self.budget, self.cache = under_test, flights, budget, cache
        self.n_cached = 0
        self.lookahead = lookahead
        self.tickets: dict[int, Ticket] = {}
        self.kv: dict[tuple[int, int], int] = {}  # page and place in it -> token id
        self.ran: dict[int, list[int]] = {}  # ids of the rows that have run, as a witness sees them, by open sequence
        self.pages: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}  # the token drawn last
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
        page, row, asked = 0, 0, []
        for seq, start, count, new, sample in plan.spans.tolist():
            self.pages[seq] += plan.pages[page : page + new].tolist()
            page += new
            if seq in cached:  # a witness knows what the pages hold; so must the Head
                assert cached[seq] % PAGE == 0
                self.ran[seq] = [self.kv[self.pages[seq][i // PAGE], i % PAGE] for i in range(cached[seq])]
                self.n_cached += cached[seq]
            assert start == len(self.ran[seq]), "a gap or an overlap"
            assert len(self.pages[seq]) == -(-(start + count) // PAGE)
            for position, id in enumerate(ids[row : row + count], start):
                if id == DRAWN_LAST:
                    assert self.lookahead and count == 1, "a token is not waited for"
                    id = self.last[seq]
                self.kv[self.pages[seq][position // PAGE], position % PAGE] = id
                self.ran[seq].append(id)
            row += count
            if sample:
                asked.append(seq)
        drawn = []
        for seq in asked:  # after every row of the step is in its page
            known = [self.kv[self.pages[seq][i // PAGE], i % PAGE] for i in range(len(self.ran[seq]))]
            assert known == self.ran[seq], "another wrote to its pages"
            assert known[: len(self.tickets[seq].prompt_ids)] == list(self.tickets[seq].prompt_ids)
            self.last[seq] = next_token(known)
            drawn.append(self.last[seq])
        for seq, rows, seal in plan.closes.tolist():
            if seal == SEAL:
                # What is hashed and signed: the prompt and every committed token but the last.
                prompt, committed = list(self.tickets[seq].prompt_ids), self.tokens[seq]
                assert rows == len(prompt) + len(committed) - 1
                assert self.ran[seq][:rows] == prompt + committed[:-1]
                assert len(self.ran[seq]) - rows <= self.lookahead
            if seal == ABANDON:
                assert rows == len(self.ran[seq])
                self.attempts[seq] = self.attempts.get(seq, 0) + 1
            del self.ran[seq], self.pages[seq]
        self.check_pages()
        assert len(self.ran) <= 5 + self.flights
        return tuple(drawn)

    def check_pages(self) -> None:
        """A page of several sequences holds rows of all of them; nobody runs a row into it any more."""
        shared = collections.Counter(p for pages in self.pages.values() for p in pages)
        for seq, pages in self.pages.items():
            for i, page in enumerate(pages):
                if shared[page] > 1:
                    assert self.cache and (i + 1) * PAGE <= len(self.ran[seq]), "a page held by two sequences"
                    for place in range(PAGE):
                        assert self.kv[page, place] == self.ran[seq][i * PAGE + place]


Course = tuple[list[tuple[int, int, int, int]], list[tuple[int, int, bool]]]
REQUESTS = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 25), st.integers(-1, 1))
COURSES = st.tuples(
    st.lists(REQUESTS, min_size=1, max_size=14),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 13), st.booleans()), max_size=8),
)  # requests: turn, length of the prompt, tokens at most, priority; stops: turn, seq, keep


def follow(course: Course, drive: Drive) -> None:
    """Every request ends, once, with the answer it has when it runs alone, or its beginning if it was stopped."""
    requests, stops = course
    arriving = [(turn, ticket(seq, *rest)) for seq, (turn, *rest) in enumerate(requests)]
    for turn in range(4000):
        for _, asked in (a for a in arriving if a[0] == turn):
            drive.admit(asked)
        for _, seq, keep in (s for s in stops if s[0] == turn):
            drive.stop(seq, keep)
        if not drive.step() and turn > 80:
            break
    assert set(drive.ended) == set(range(len(requests)))
    s = drive.scheduler
    assert s.running == s.waiting == s.in_flight == len(drive.ran) == 0
    for seq, asked in drive.tickets.items():
        whole, got = answer_of(asked), drive.tokens[seq]
        assert got == whole[: len(got)]
        if not any(seq == stopped for _, stopped, _ in stops):
            assert got == whole and drive.ended[seq] == ("stop" if whole[-1] == STOP else "length")


@settings(max_examples=200, deadline=None)
@given(
    course=COURSES,
    n_pages=st.integers(14, 40),
    max_step_tokens=st.integers(1, 12),
    flights=st.integers(1, 4),
    lookahead=st.integers(0, 2),
    micro_batches=st.integers(1, 3),
    cache=st.booleans(),
)
def test_every_request_ends_once_with_its_own_answer_and_all_pages_come_back(
    course: Course, n_pages: int, max_step_tokens: int, flights: int, lookahead: int, micro_batches: int, cache: bool
) -> None:
    """Whatever arrives and is stopped whenever, however few pages there are: nothing is lost, and nothing leaks."""
    under_test = scheduler(
        n_pages=n_pages,
        max_step_tokens=max_step_tokens,
        lookahead=lookahead,
        micro_batches=micro_batches,
        prefix_cache=cache,
    )
    follow(course, Drive(under_test, flights, max_step_tokens, lookahead, cache))
    assert under_test.free_pages == n_pages


def test_an_answer_has_exactly_max_tokens_unless_a_stop_id_came() -> None:
    s = scheduler(micro_batches=1)
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


def test_looking_ahead_the_micro_batches_take_turns() -> None:
    """Were they mixed, each step would wait for the tokens of the one before it."""
    s = scheduler(micro_batches=2)
    for seq in range(4):
        s.admit(ticket(seq, 1, 9))
    drew: set[int] = set()
    while len(drew) < 4:
        plan = s.plan()
        assert plan is not None
        drew |= {c.seq for c in s.apply(StepResult(1, plan.step, (1,) * len(plan.spans)))}
    s.look_ahead(1)
    plans = [plan for _ in range(4) if (plan := s.plan()) is not None]
    assert [plan.spans["seq"].tolist() for plan in plans] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert s.plan() is None
    s.apply(StepResult(1, plans[0].step, (1, 1)))
    following = s.plan()
    assert following is not None and following.spans["seq"].tolist() == [0, 2]


def test_cohorts_stay_as_they_are_until_they_are_unequal() -> None:
    """16 sequences, of which 5 of one half end: one that is left of the other half changes sides, and only one."""
    s = scheduler(micro_batches=2, n_pages=400, max_running=16, lookahead=1)
    for seq in range(16):
        s.admit(ticket(seq, 1, 30))
    members: list[set[int]] = []
    flights: list[StepPlan] = []
    for turn in range(60):
        while len(flights) < 4 and (plan := s.plan()) is not None:
            flights.append(plan)
        plan = flights.pop(0)
        if turn in (20, 21):
            members.append(set(plan.spans["seq"].tolist()))
        if turn == 22:
            gone = sorted(members[0])[:5]
            for seq in gone:
                s.stop(seq, "cancelled")
        if turn >= 40 and len(members) < 4:
            members.append(set(plan.spans["seq"].tolist()))
        if plan.rows:
            s.apply(StepResult(1, plan.step, (1,) * int(plan.spans["sample"].sum())))
    assert members[0] | members[1] == set(range(16)) and not members[0] & members[1]
    after = sorted(members[2:], key=len)
    assert [len(cohort) for cohort in after] == [5, 6] and len(after[0] & members[1]) + len(after[1] & members[0]) <= 2


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


def test_what_a_failed_request_has_read_or_computed_is_found_by_nobody_after_it() -> None:
    """A page that spoilt it, by a fault of memory say, would spoil every other that begins so."""
    s = scheduler(micro_batches=1, max_step_tokens=12, prefix_cache=True)

    def opened(seq: int) -> StepPlan:
        s.admit(ticket(seq, 16, 4))
        plan = s.plan()
        assert plan is not None
        return plan

    s.apply(StepResult(1, opened(0).step, ()))  # 12 rows of 16: three pages can be found
    second = opened(3)  # of the same beginning
    assert second.opens["cached"].tolist() == [12]
    assert set(s.drop_step(second.step)) == {0, 3}
    assert s.free_pages == 40
    assert opened(6).opens["cached"].tolist() == [0]


def test_what_is_computed_from_distrusted_pages_is_not_found_either() -> None:
    s = scheduler(micro_batches=1, max_step_tokens=8, prefix_cache=True)
    s.admit(ticket(0, 16, 4))
    first = s.plan()
    assert first is not None
    s.apply(StepResult(1, first.step, ()))
    s.distrust()
    second = s.plan()
    assert second is not None
    s.apply(StepResult(1, second.step, (100,)))  # all of its prompt has run, half of it before
    s.admit(ticket(3, 16, 4))
    third = s.plan()
    assert third is not None and third.opens["cached"].tolist() == [0]


def test_only_answers_with_tokens_that_someone_waits_for_are_sealed() -> None:
    """A hang-up needs no receipt; a stop string's answer does."""
    for reason, seal in (("stop", 1), ("cancelled", 0)):
        s = scheduler(micro_batches=1)
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
    drive = Drive(s, flights=1, budget=2)
    for seq in range(5):
        drive.admit(ticket(seq, 3, 6))
    while drive.step():
        pass
    assert set(drive.ended) == set(range(5)) and s.free_pages == 40


def test_the_youngest_gives_its_pages_to_the_oldest_and_later_begins_anew_with_all_it_knew() -> None:
    """Two that do not fit together: the first is never thrown out, the second loses no token."""
    s = scheduler(n_pages=6, micro_batches=1)
    drive = Drive(s, flights=1)
    first, second = ticket(0, 8, 13), ticket(1, 8, 13)  # five pages each, in the end
    drive.admit(first)
    drive.admit(second)
    while drive.step():
        pass
    assert s.preemptions >= 1 and drive.attempts.keys() == {1}
    assert {0: answer_of(first), 1: answer_of(second)} == drive.tokens
    assert s.rows_abandoned > 0 and s.free_pages == 6


def test_one_stopped_while_it_waits_to_begin_anew_runs_its_rows_for_the_receipt_and_draws_no_more() -> None:
    s = scheduler(n_pages=6, micro_batches=1)
    drive = Drive(s, flights=1)
    for seq in (0, 1):
        drive.admit(ticket(seq, 8, 13))
    while not drive.attempts:
        drive.step()
    known = list(drive.tokens[1])
    drive.stop(1, keep=True)
    while drive.step():
        pass
    assert drive.ended[1] == "stop" and drive.tokens[1] == known and drive.tokens[0] == answer_of(drive.tickets[0])


def first_spans(s: Scheduler, n: int) -> list[list[tuple[int, int]]]:
    """Of the next n plans, who runs how many rows."""
    plans = [s.plan() for _ in range(n)]
    return [[(int(x["seq"]), int(x["count"])) for x in p.spans] if p is not None else [] for p in plans]


def test_a_long_prompt_is_shared_out_over_the_stages() -> None:
    """Three stages have a third each, instead of one the whole and two nothing; what is left later goes on so."""
    s = scheduler(micro_batches=3, max_step_tokens=64, n_pages=40)
    s.admit(ticket(0, 90, 4))
    assert first_spans(s, 4) == [[(0, 30)], [(0, 30)], [(0, 30)], []]


def test_short_prompts_too_but_no_pass_over_the_weights_is_for_a_few_rows() -> None:
    s = scheduler(micro_batches=3, max_step_tokens=64)
    for seq in range(4):
        s.admit(ticket(seq, 5, 4))
    assert first_spans(s, 4) == [[(0, 5), (1, 3)], [(1, 2), (2, 5), (3, 1)], [(3, 4)], []]


def test_many_that_draw_leave_a_part_of_the_budget_to_prompts() -> None:
    """More decode than fit into a step; a prompt goes on all the same, and they do."""
    s = scheduler(micro_batches=1, max_step_tokens=4, max_running=7)
    drive = Drive(s, flights=1, budget=4)
    for seq in range(6):
        drive.admit(ticket(seq, 1, 25))
    while not all(drive.tokens.values()):
        drive.step()
    drive.admit(ticket(6, 20, 2))
    assert first_spans(s, 1) == [[(0, 1), (1, 1), (2, 1), (6, 1)]]


def test_the_more_urgent_goes_first_and_is_preempted_last() -> None:
    s = scheduler(n_pages=6, micro_batches=1, max_running=2)
    drive = Drive(s, flights=1)
    for seq, priority in ((0, 0), (1, 1), (2, 0), (3, 2)):
        drive.admit(ticket(seq, 8, 13, priority))
    while drive.step():
        pass
    # 0 and 1 were seated as they came; 0 makes room for 1, and 3 goes before both that are left.
    assert 1 not in drive.attempts and 3 not in drive.attempts and drive.attempts.keys() >= {0}
    assert list(drive.ended) == [1, 3, 0, 2]
    assert drive.tokens == {seq: answer_of(asked) for seq, asked in drive.tickets.items()}


@pytest.mark.parametrize("levels", [1, 2])
def test_nobody_starves_however_many_more_urgent_ones_arrive(levels: int) -> None:
    """So many overtake it as the levels between are worth; then it is served, though they still come."""
    s = scheduler(max_running=1, n_pages=6, micro_batches=1, max_waiting=1000)
    drive = Drive(s, flights=1)
    drive.admit(ticket(0, 1, 9, 0))
    drive.admit(ticket(1, 1, 1, -levels))
    seq = 2
    while 1 not in drive.ended:
        drive.admit(ticket(seq, 1, 1, 0))
        seq += 1
        drive.step()
    overtook = sum(other > 1 for other in drive.ended)
    assert levels * LEVEL_ARRIVALS - 3 <= overtook <= levels * LEVEL_ARRIVALS


def test_beginnings_of_another_salt_are_not_shared() -> None:
    """Nor does one salt's name stand for another's."""
    s = scheduler(prefix_cache=True, micro_batches=1)
    drive = Drive(s, flights=1, cache=True)
    for seq, salt in ((0, b"a"), (3, b"a"), (6, b"b"), (9, b"")):
        drive.admit(ticket(seq, 20, 1, salt=salt))
        while drive.step():
            pass
    assert drive.n_cached == 16 and s.cached_tokens == 16 and s.prompt_tokens == 80


def test_long_beginnings_that_are_there_already_do_not_make_a_plan_that_stages_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their pages travel in the plan that opens a sequence: several take several plans."""
    monkeypatch.setattr("serve_app.scheduling.scheduler.MAX_ITEMS", 12)
    s = scheduler(prefix_cache=True, micro_batches=1, max_running=5)
    drive = Drive(s, flights=1, cache=True)
    drive.admit(ticket(0, 30, 1))
    while drive.step():
        pass
    for seq in (3, 6, 9):
        drive.admit(ticket(seq, 30, 1))
    opened = []
    while (plan := s.plan()) is not None:
        assert len(plan.pages) <= 12
        opened.append(len(plan.opens))
    assert opened == [1, 1, 1]


def test_of_pages_nobody_holds_the_one_unused_longest_goes_first_and_ends_before_beginnings() -> None:
    """A beginning that many share outlives what followed it once."""
    pool = PagePool(4)
    names = page_names(no_page(b""), range(16), 4)
    first = pool.take(2)
    for page, name in zip(first, names, strict=False):
        pool.name(page, name)
    pool.give_back(first)
    assert pool.free == 4 and pool.find(names) == first and pool.unheld(first) == 2
    held = pool.take(3)  # two that hold nothing, then the second of the first two
    assert pool.find(names) == first[:1] and first[1] in held
    pool.share(first[:1])
    assert pool.free == 0 and pool.unheld(first[:1]) == 0
    pool.give_back(first[:1])
    assert pool.free == 1 and pool.take(1) == first[:1] and pool.find(names) == []
