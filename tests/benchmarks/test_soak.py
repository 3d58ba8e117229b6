"""A short soak, and that the watch and the count of rows see what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.counters import counter, free_pages, prefix_hits, rows_problem
from benchmarks.models import published
from benchmarks.process_watch import ProcessWatch
from benchmarks.soak import soak


@pytest.mark.slow
@pytest.mark.parametrize("http", [False, True], ids=["local", "http"])
def test_ten_seconds_of_everything_leave_nothing_behind(tmp_path: Path, http: bool) -> None:
    model = published(tmp_path, "tiny")
    figures, problems = soak(model, seconds=10, stages=2, clients=24, prompts=8, http=http, seed=1)
    assert problems == []
    assert figures["requests_ended"] > 40
    assert figures["hung_up"] and figures["stopped_by_string"]


def watched(growth_bytes_per_s: int = 0, threads: int = 8) -> list[str]:
    samples = [(float(s), 300_000_000 + growth_bytes_per_s * s, threads if s > 50 else 8, 20) for s in range(100)]
    return ProcessWatch(samples).problems()


def test_growth_is_seen_and_noise_is_not() -> None:
    assert watched() == []
    assert "memory grew by 69" in watched(growth_bytes_per_s=1_000_000)[0]
    assert watched(threads=20) == ["threads grew from 8 to 20"]
    assert ProcessWatch().problems()


BEFORE = {"rows_run": 2}


def test_rows_that_do_not_add_up_are_named() -> None:
    """Every row of a receipt was hashed by every stage; nothing was hashed that did not run."""
    after = {"rows_run": 102}
    assert rows_problem(BEFORE, after, [100, 100], 100) is None
    assert "different numbers" in str(rows_problem(BEFORE, after, [100, 99], 100))
    assert "speak of 101" in str(rows_problem(BEFORE, after, [100, 100], 101))
    assert "speak of 90" in str(rows_problem(BEFORE, after, [100, 100], 90))
    assert rows_problem(BEFORE, after, [100, 100], 90, cancelled_rows=20) is None
    assert "100 rows were run, 90 hashed" in str(rows_problem(BEFORE, after, [90, 90], 90))
    assert rows_problem(BEFORE, after, [90], 90) is None  # one stage looks ahead: void rows


def test_a_build_that_counts_more_is_read_too() -> None:
    """A preempted request runs some rows twice; rows of a cached prefix need not run; pages may be kept in a cache."""
    again = {"rows_run": 142, "preemptions": 3, "rows_abandoned": 40}
    assert rows_problem(BEFORE, again, [100, 100], 100) is None
    assert "41 abandoned" in str(rows_problem(BEFORE, {**again, "rows_abandoned": 41}, [100, 100], 100))
    cached = {"rows_run": 82, "cached_tokens": 20}
    assert rows_problem(BEFORE, cached, [80, 80], 100) is None
    assert rows_problem(BEFORE, cached, [80, 80], 100, reused=[20, 20]) is None
    assert "99 rows were hashed" in str(rows_problem(BEFORE, cached, [80, 80], 100, reused=[19, 19]))
    assert "79 rows were hashed" in str(rows_problem(BEFORE, cached, [79, 79], 100))
    assert prefix_hits(cached) == 20 and prefix_hits(BEFORE) is None
    assert free_pages({"free_pages": 60, "prefix": {"cached_pages": 20}}, 80) == 80
    assert free_pages({"free_pages": 80, "cached_pages": 20}, 80) == 80
    assert counter({"prefix": {"hit_tokens": 5}, "stages": [{"hit": 9}]}, "hit") == 5
    assert counter({"running": 1}, "hit") is None
