"""Guessing: what is guessed, and that no guess, right or wrong, changes an answer or what is signed for it."""

from __future__ import annotations

import dataclasses
import queue

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.engine import StepOutput
from serve_app.messages.request import Sampling
from serve_app.messages.step import DRAW_EACH, DRAW_NEXT, MAX_GUESSES, Reply, Roots, Signed, StepPlan, StepResult
from serve_app.pipeline.witness import StageSpan, Witness
from serve_app.receipts.drawn import asked_hash
from serve_app.receipts.identity import NodeIdentity
from serve_app.receipts.rows import PAGE_ROWS, Boundary, RowTree, ids_boundary, ids_bytes, ids_root
from serve_app.receipts.statement import StageStatement, StatementChain
from serve_app.scheduling.scheduler import Scheduler
from serve_app.scheduling.speculation import MAX_GUESSED_ROWS, Guesser, room_for_guesses
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.signing import Envelope, Signer
from tests.scheduler_drive import COURSES, STOP, Course, Drive, follow, repeating, scheduler, ticket

MANIFEST = Cid.of(Codec.DAG_CBOR, b"a model")


def learnt(tokens: list[int], n_prompt: int) -> Guesser:
    guesser = Guesser(n_prompt)
    guesser.learn(tokens)
    return guesser


@pytest.mark.parametrize(
    ("tokens", "guessed"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 2, 3], [4, 5, 6]),  # what followed 2 3
        ([8, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3], [4, 9, 2]),  # what followed 8 2 3, though 2 3 came later too
        ([1, 2, 3, 1, 2, 5, 1, 2], [5, 1, 2]),  # of equals the latest
        ([7, 7, 7], [7, 7, 7]),  # what repeats itself goes on
        ([5, 1, 2, 1, 2, 1], [2, 1, 2]),
        ([1, 2, 3, 4, 1], []),  # one token is not enough
        ([1], []),
    ],
)
def test_a_guess_is_what_followed_the_longest_end_that_stood_before(tokens: list[int], guessed: list[int]) -> None:
    assert learnt(tokens, len(tokens)).guesses(tokens, 3) == guessed
    one_by_one = Guesser(len(tokens))
    for n in range(1, len(tokens) + 1):
        one_by_one.learn(tokens[:n])
    assert one_by_one.guesses(tokens, 3) == guessed


def test_three_tokens_that_would_have_been_guessed_begin_the_guessing_and_three_others_end_it() -> None:
    """The longer they are right, the more are made."""
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    guesser, seen = learnt(tokens, 10), []
    for token in (3, 4, 5, 6, 7, 8, 1, 90, 91, 92, 93):
        tokens.append(token)
        guesser.learn(tokens)
        seen.append(guesser.run if guesser.pays else 0)
    assert seen == [0, 0, 2, 3, 4, 5, 7, 2, 0, 0, 0]


def test_guesses_are_few_enough_that_a_step_costs_little_more() -> None:
    assert [room_for_guesses(8, n, 512) for n in (0, 1, 3, 4, 8, 16, 17, 64)] == [0, 8, 8, 7, 3, 1, 0, 0]
    assert room_for_guesses(8, 1, 4) == 3 and room_for_guesses(2, 1, 512) == 2
    assert all(n * (1 + room_for_guesses(8, n, 512)) <= MAX_GUESSED_ROWS for n in range(1, 33))


def of_one(
    max_tokens: int, said: tuple[int, ...] = (11, 12, 13, 14, 15, 16), **limits: int
) -> tuple[Scheduler, StepPlan]:
    """A sequence whose prompt says this twice, and which begins to say it again and to guess; its plan."""
    s = scheduler(**{"micro_batches": 1, "max_step_tokens": 16, "speculate": 4} | limits)
    s.admit(dataclasses.replace(ticket(0, 6, max_tokens), prompt_ids=said * 2))
    plan = s.plan()
    assert plan is not None
    for token in said[:3]:
        s.apply(StepResult(1, plan.step, (token,)))
        plan = s.plan()
        assert plan is not None
    return s, plan


def test_what_is_drawn_behind_right_guesses_counts_and_the_rest_is_run_again() -> None:
    s, plan = of_one(20)
    assert plan.spans.tolist() == [(0, 14, 3, 1, DRAW_EACH)] and plan.draws.tolist() == [3]
    assert np.frombuffer(s.rows_of(plan), "<u4").tolist() == [13, 14, 15]
    assert s.plan() is None, "it waits for what it drew"
    drawn = s.apply(StepResult(1, plan.step, (14, 99, 98)))
    assert [(c.token, c.reason) for c in drawn] == [(14, None), (99, None)]
    assert (s.guesses, s.guesses_right) == (2, 1)
    plan = s.plan()
    assert plan is not None and plan.spans.tolist() == [(0, 16, 1, 0, DRAW_NEXT)]


@pytest.mark.parametrize(("drawn", "counted"), [((14, STOP, 16), [14, STOP]), ((STOP, 15, 16), [STOP])])
def test_an_answer_ends_at_the_stop_token_in_the_middle_of_a_run(drawn: tuple[int, ...], counted: list[int]) -> None:
    s, plan = of_one(20)
    ended = s.apply(StepResult(1, plan.step, drawn))
    assert [c.token for c in ended] == counted and [c.reason for c in ended] == [None, "stop"][-len(counted) :]
    closing = s.plan()
    assert closing is not None and closing.closes.tolist() == [(0, 14 + len(counted), 1)] and s.free_pages == 40


def test_right_guesses_behind_the_end_are_void() -> None:
    """The prompt has a stop id in it, which is guessed and drawn."""
    s, plan = of_one(20, (11, 12, 13, STOP, 15, 16))
    ended = s.apply(StepResult(1, plan.step, (STOP, 15, 16)))
    assert [(c.token, c.reason) for c in ended] == [(STOP, "stop")] and (s.guesses, s.guesses_right) == (2, 0)


def test_no_guess_goes_beyond_max_tokens() -> None:
    """Three have been drawn: of five, two are left, so one guess."""
    s, plan = of_one(5)
    assert plan.spans["count"].tolist() == [2]
    assert [c.reason for c in s.apply(StepResult(1, plan.step, (14, 15)))] == [None, "length"]


def test_whoever_is_penalised_for_what_it_draws_does_not_guess() -> None:
    s = scheduler(micro_batches=1, max_step_tokens=16, speculate=4)
    s.admit(dataclasses.replace(ticket(0, 6, 30), sampling=Sampling(0, presence_micro=5)))
    for _ in range(12):
        plan = s.plan()
        assert plan is not None and plan.spans["sample"].tolist() == [DRAW_NEXT]
        s.apply(StepResult(1, plan.step, (7,)))


def test_guesses_take_no_page_that_somebody_needs() -> None:
    s, plan = of_one(8, n_pages=5)  # 20 positions, of which 14 are taken: one page is free, and stays so
    assert plan.spans[["count", "new_pages"]].tolist() == [(2, 0)]
    assert s.free_pages == 1


def test_tokens_of_a_step_with_guesses_are_counted_before_they_are_believed() -> None:
    s, plan = of_one(20)
    with pytest.raises(Exception, match="3 tokens and got 1"):
        s.apply(StepResult(1, plan.step, (14,)))
    assert s.in_flight == 1


COMMON = dict(
    course=COURSES,
    guesses=st.integers(1, MAX_GUESSES),
    surprises=st.integers(0, 12),
    max_step_tokens=st.integers(1, 40),
    flights=st.integers(1, 4),
    lookahead=st.integers(0, 2),
    cache=st.booleans(),
)


def driven(guesses: int, lookahead: int, n_pages: int, page_size: int, cache: bool, max_step_tokens: int) -> Scheduler:
    return scheduler(
        n_pages=n_pages,
        page_size=page_size,
        max_step_tokens=max_step_tokens,
        lookahead=lookahead,
        micro_batches=1 if lookahead else 2,
        prefix_cache=cache,
        speculate=guesses,
    )


@settings(max_examples=150, deadline=None)
@given(n_pages=st.integers(14, 40), **COMMON)
def test_every_request_has_the_answer_it_has_without_guesses_and_all_pages_come_back(
    course: Course,
    n_pages: int,
    guesses: int,
    surprises: int,
    max_step_tokens: int,
    flights: int,
    lookahead: int,
    cache: bool,
) -> None:
    """Whatever is guessed, arrives, is stopped or preempted."""
    under_test = driven(guesses, lookahead, n_pages, 4, cache, max_step_tokens)
    model = repeating(surprises)
    follow(course, Drive(under_test, flights, max_step_tokens, lookahead, cache, guesses=guesses, model=model))
    assert under_test.free_pages == n_pages
    assert 0 <= under_test.guesses_right <= under_test.guesses


class Witnessed(Drive):
    """Its stage hashes what it runs: ids that come in, and for each of them four other bytes that go out."""

    def watch(self) -> None:
        node = NodeIdentity(Signer.fresh())
        self.n_rows = 0
        self.outlet = Boundary(MANIFEST, 1, "float32", 1)
        inlet = ids_boundary(MANIFEST)
        span = StageSpan(MANIFEST, 0, 1, 0, 1, shards=(), profile="a test", inlet=inlet, outlet=self.outlet)
        self.replies: queue.Queue[Reply] = queue.Queue()
        chain = StatementChain(node.open_session("stage", 1, 1, 100))
        self.witness = Witness(span, chain, self.replies.put, page_size=self.page_size)

    def saw(self, plan: StepPlan, rows: list[int], drawn: list[int]) -> None:
        self.n_rows += plan.rows
        self.witness.saw(plan, StepOutput(memoryview(ids_bytes(rows)), left(rows), tuple(drawn)))

    def check_roots(self) -> None:
        """All that is told is over the tokens that count, each once, whatever else ran in between."""
        answered = {seq for seq, why in self.ended.items() if why in ("stop", "length") and self.tokens[seq]}
        while (plan := self.scheduler.plan()) is not None:  # the last closes
            self.check(plan)
        for seq in answered:
            self.scheduler.sign(seq)
        while (plan := self.scheduler.plan()) is not None:
            self.check(plan)
        self.witness.close()
        told = [self.replies.get() for _ in range(self.replies.qsize())]
        assert {r.seq for r in told if isinstance(r, Roots)} == answered
        self.check_draws([r for r in told if isinstance(r, Signed)], answered)
        for roots in told:
            if isinstance(roots, Signed):
                continue
            assert isinstance(roots, Roots), roots
            fed = [*self.tickets[roots.seq].prompt_ids, *self.tokens[roots.seq]][:-1]
            out = RowTree(self.outlet)
            out.append(0, left(fed))
            assert (roots.rows, roots.in_root, roots.out_root) == (len(fed), ids_root(MANIFEST, fed), out.root())

    def check_draws(self, signed: list[Signed], answered: set[int]) -> None:
        """What is signed for drawing is the answer; of one begun anew, what was drawn since."""
        assert {one.seq for one in signed} == answered
        for one in signed:
            sealed = Envelope.from_value(canonical.decode(one.statement, max_bytes=1 << 16), "statement", 1 << 16)
            said, n_prompt = StageStatement.decode(sealed.payload), len(self.tickets[one.seq].prompt_ids)
            assert said.drawn is not None and said.n_rows + 1 >= said.drawn.first >= n_prompt
            assert said.attempt or said.drawn.first == n_prompt
            tokens = self.tokens[one.seq][said.drawn.first - n_prompt :]
            assert said.drawn.root == ids_root(MANIFEST, tokens, said.drawn.first)
            assert said.drawn.asked == asked_hash(MANIFEST, bytes(8), Sampling(0), (), 0)


def left(ids: list[int]) -> memoryview:
    """The rows that leave the layers, of these that enter."""
    return memoryview(ids_bytes([3 * id + 1 for id in ids]))


@settings(max_examples=100, deadline=None)
@given(n_pages=st.integers(4, 12), page_size=st.sampled_from([16, 16, 32, 20]), **COMMON)
def test_what_is_hashed_is_what_counts_whichever_guesses_were_wrong(
    course: Course,
    n_pages: int,
    page_size: int,
    guesses: int,
    surprises: int,
    max_step_tokens: int,
    flights: int,
    lookahead: int,
    cache: bool,
) -> None:
    """Also where a wrong guess filled a page of rows, where pages are found by others, and in attempts begun anew."""
    cache = cache and page_size % PAGE_ROWS == 0
    under_test = driven(guesses, lookahead, n_pages, page_size, cache, max_step_tokens)
    more = {"guesses": guesses, "model": repeating(surprises), "page_size": page_size}
    drive = Witnessed(under_test, flights, max_step_tokens, lookahead, cache, **more)
    drive.watch()
    follow(course, drive)
    drive.check_roots()
    assert under_test.free_pages == n_pages
    assert drive.witness.rows_abandoned == under_test.rows_abandoned
    n_void = under_test.guesses - under_test.guesses_right
    n_known = drive.witness.rows_hashed + drive.witness.rows_abandoned + n_void
    assert n_known == drive.n_rows or (n_known < drive.n_rows and (lookahead or course[1]))
