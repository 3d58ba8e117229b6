"""Stages that are lost and replaced: what the scheduler knows goes on, behind the tokens that were drawn."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.messages.step import SEAL, StepResult
from tests.scheduler_drive import COURSES, Course, Drive, follow, repeating, scheduler, ticket


@settings(max_examples=200, deadline=None)
@given(
    course=COURSES,
    restarts=st.sets(st.integers(0, 60), max_size=6),
    n_pages=st.integers(14, 40),
    flights=st.integers(1, 4),
    lookahead=st.integers(0, 2),
    micro_batches=st.integers(1, 3),
    cache=st.booleans(),
)
@example(  # stopped while its rows run again: what it draws behind them is void
    course=([(0, 1, 1, 0)] * 6 + [(0, 1, 21, 0)], [(22, 6, True)]),
    restarts={21},
    n_pages=14,
    flights=3,
    lookahead=0,
    micro_batches=1,
    cache=False,
)
def test_whenever_stages_are_lost_every_request_ends_once_with_its_own_answer(
    course: Course, restarts: set[int], n_pages: int, flights: int, lookahead: int, micro_batches: int, cache: bool
) -> None:
    under_test = scheduler(n_pages=n_pages, lookahead=lookahead, micro_batches=micro_batches, prefix_cache=cache)
    follow(course, Drive(under_test, flights, 8, lookahead, cache), restarts)
    assert under_test.free_pages == n_pages


@settings(max_examples=100, deadline=None)
@given(course=COURSES, restarts=st.sets(st.integers(0, 40), max_size=4), surprises=st.integers(0, 8))
def test_guesses_on_their_way_are_forgotten_too(course: Course, restarts: set[int], surprises: int) -> None:
    under_test = scheduler(speculate=4, max_step_tokens=24)
    follow(course, Drive(under_test, 2, 24, guesses=4, model=repeating(surprises)), restarts)


def test_one_that_was_resumed_goes_before_those_that_begin_and_is_never_refused() -> None:
    s = scheduler(max_running=1, max_waiting=0, micro_batches=1)
    s.admit(ticket(0, 3, 4))
    s.admit(replace(ticket(1, 3, 8), drawn=(101, 102), attempt=3))
    assert (s.running, s.waiting) == (1, 1)
    s.restart(2)
    plan = s.plan()
    assert plan is not None and plan.opens[["seq", "attempt"]].tolist() == [(1, 3)]
    assert plan.spans[["start", "count", "sample"]].tolist() == [(0, 5, 1)]


def test_one_that_had_drawn_everything_only_runs_its_rows_again_to_be_sealed() -> None:
    s = scheduler(micro_batches=1)
    s.admit(replace(ticket(0, 3, 4), drawn=(101, 102), final="stop", attempt=1))
    plan = s.plan()
    assert plan is not None and plan.spans[["count", "sample"]].tolist() == [(4, 0)]
    (ended,) = s.apply(StepResult(1, plan.step, ()))
    assert (ended.token, ended.reason, ended.attempt) == (None, "stop", 1)
    closing = s.plan()
    assert closing is not None and closing.closes.tolist() == [(0, 4, SEAL)]
