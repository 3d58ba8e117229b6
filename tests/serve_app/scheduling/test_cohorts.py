"""Two stages that pass tokens on among themselves are both busy nearly all the time, by a clock that is computed."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.messages.request import Sampling
from serve_app.messages.step import DRAWN_LAST, StepResult
from serve_app.scheduling.flights import flights_ahead
from serve_app.scheduling.scheduler import Scheduler, Ticket
from tests.scheduler_drive import Drive, follow, scheduler

STAGE_MS = 5.0  # of a decode step in either stage
HEAD_MS = 0.5  # until the Head has a step's result
PROMPT_MS = 0.02  # of a row of a prompt


def milliseconds(ahead: int, flights: int, n: int, tokens: int) -> float:
    """When n requests have got so many tokens each."""
    s = Scheduler(
        epoch=1,
        n_pages=10_000,
        page_size=16,
        max_step_tokens=256,
        max_running=n,
        max_waiting=n,
        micro_batches=2,
        lookahead=ahead,
    )
    for seq in range(n):
        prompt, sampling = (7,) * (8 + seq % 5), Sampling(0)
        s.admit(Ticket(seq, bytes(32), prompt, tokens, sampling, bytes(8), frozenset()))
    now, ends = 0.0, [0.0, 0.0]
    drawn: dict[int, float] = {}  # when the last token of each was there
    on_way: list[tuple[float, int, int]] = []
    while True:
        while s.in_flight < flights and (plan := s.plan()) is not None:
            if not plan.rows:
                continue
            seqs, counts = plan.spans["seq"].tolist(), plan.spans["count"].astype(int)
            firsts = np.frombuffer(s.rows_of(plan), "<u4")[np.cumsum(counts) - counts].tolist()
            known = max((drawn[q] for q, id in zip(seqs, firsts, strict=True) if id == DRAWN_LAST), default=0.0)
            took = max(STAGE_MS, PROMPT_MS * plan.rows)
            ends[0] = max(ends[0], now, known) + took
            ends[1] = max(ends[1], ends[0]) + took
            sampled = plan.spans["sample"] > 0
            drawn |= {q: ends[1] for q, sample in zip(seqs, sampled.tolist(), strict=True) if sample}
            on_way.append((ends[1] + HEAD_MS, plan.step, int(sampled.sum())))
        if not on_way:
            return now
        on_way.sort()
        back, step, count = on_way.pop(0)
        now = max(now, back)
        s.apply(StepResult(1, step, (9,) * count))


@pytest.mark.parametrize("n", [2, 16, 61])
def test_no_stage_waits_for_a_token(n: int) -> None:
    """Two cohorts, a step of each stage a token: twice a stage's time for all, and more where tokens are waited for."""
    ahead, waiting = (
        (milliseconds(*how, n, 200) - milliseconds(*how, n, 100)) / 100 for how in ((1, flights_ahead(2)), (0, 3))
    )
    assert ahead < 2 * STAGE_MS * 1.03 < waiting


def test_a_cohort_that_finds_no_page_leaves_its_turn_to_another() -> None:
    """Of few pages: the first in rank takes one from the last, which stands in another cohort, and nothing stands."""
    requests = [(0, 1, 9, -1), (0, 11, 4, 0), (4, 1, 19, 1), (0, 1, 16, 0), (0, 25, 17, 0), (0, 9, 9, 0)]
    follow((requests, []), Drive(scheduler(n_pages=14, max_step_tokens=2, lookahead=1, micro_batches=3), 1, 2, 1))
