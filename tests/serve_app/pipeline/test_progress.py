"""When a step is overdue, and which of several stages is to blame."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from serve_app.pipeline.progress import Progress, hanging
from shard_tools.canonical import Value

FLOOR_S = 0.05


def learned(*steps: tuple[int, float]) -> Progress:
    """One that has seen steps of so many rows take so many seconds."""
    progress = Progress(FLOOR_S)
    for rows, seconds in steps:
        with progress.computing(1, rows, time.perf_counter() - seconds):
            pass
    return progress


def overdue_after(progress: Progress, rows: int, seconds: float) -> bool:
    with progress.computing(7, rows):
        time.sleep(seconds)
        return progress.overdue() is not None


def test_nothing_is_overdue_that_cannot_be_compared_or_does_not_run() -> None:
    assert not overdue_after(Progress(0.0), 1, 0.01)
    assert learned((1, 1e-6)).overdue() is None


def test_a_step_is_overdue_past_twenty_times_what_its_like_took_and_never_before_the_floor() -> None:
    quick = learned((1, 1e-6))
    assert not overdue_after(quick, 1, FLOOR_S / 5)
    assert overdue_after(quick, 1, FLOOR_S * 1.5)
    assert not overdue_after(learned((1, 0.1)), 1, FLOOR_S * 1.5)


def test_more_rows_than_ever_may_take_longer_in_proportion() -> None:
    assert not overdue_after(learned((1, 0.002)), 512, FLOOR_S * 1.5)
    assert overdue_after(learned((1, 0.002), (512, 0.002)), 512, FLOOR_S * 1.5)


def test_one_slow_step_is_forgotten() -> None:
    assert overdue_after(learned((1, 0.05), *((1, 1e-6),) * 200), 1, FLOOR_S * 1.5)


def test_another_thread_sees_who_waits_and_for_which_step() -> None:
    progress, go_on, began = learned((4, 1e-6)), threading.Event(), threading.Event()

    def compute() -> None:
        with progress.computing(12, 4):
            began.set()
            go_on.wait(10)

    thread = threading.Thread(target=compute)
    thread.start()
    began.wait(10)
    time.sleep(FLOOR_S * 1.5)
    late = progress.overdue()
    go_on.set()
    thread.join()
    assert late is not None and late.step == 12 and late.waited_s > late.limit_s == FLOOR_S
    assert progress.overdue() is None


def said(stage: int, step: int | None) -> Value:
    late: Value = None if step is None else {"step": step, "waited_ms": 9000, "limit_ms": 5000}
    return {"stage": stage, "overdue": late}


def test_the_first_stage_of_the_oldest_step_hangs_and_the_others_wait_for_it() -> None:
    assert hanging([said(0, None), said(1, None)]) is None
    found = hanging([said(0, 9), said(1, 8), said(2, 8), said(3, None)])
    assert found is not None and found[0] == 1 and "step 8" in found[1]


@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
)
def test_whatever_another_operator_says_breaks_nothing(words: list[Value]) -> None:
    assert hanging(words) is None
    assert (
        hanging([{"stage": w, "overdue": {"step": w, "waited_ms": w}} for w in words if not isinstance(w, int)]) is None
    )
