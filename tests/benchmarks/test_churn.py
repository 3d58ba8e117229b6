"""What the churn benchmark makes of deaths and answers; its short form against the real application is tests/chaos."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.churn import Load, shares, stalls, summary, table
from benchmarks.churn_deaths import Death, Health
from benchmarks.http_client import Reply
from benchmarks.known_answers import Judged, Known, Question
from benchmarks.report import Result
from benchmarks.workload import Arrival
from tests.e2e.parts import dashboard_of


def reply(pieces: list[float], ended_s: float, error: str | None = None) -> Reply:
    return Reply(pieces[0] - 1, status=200, piece_s=pieces, error=error, ended_s=ended_s)


def test_a_stall_is_the_longest_silence_over_a_death_less_the_median_one() -> None:
    """Silence before the death, or after the next, is not of it; streams that ended or had not begun saw nothing."""
    deaths = [Death("stage 0", "SIGKILL", 10.5), Death("head", "SIGKILL", 20.0)]
    over = reply([5.0, 9.0, 10.0, 14.0, 15.0, 16.0, 25.0, 26.0], 27.0)
    others = [reply([1.0, 2.0], 10.0), reply([11.0, 12.0], 13.0), reply([10.0, 11.0], 12.0, error="it failed")]
    assert stalls([over, *others], deaths, 0) == [3.0]
    assert stalls([over, *others], deaths, 1) == [8.0]


def test_a_stream_that_never_goes_on_to_speak_stalled_until_its_end() -> None:
    """All of its text had come: what it waited for then was the end and the receipt."""
    assert stalls([reply([1.0, 2.0], 9.0)], [Death("head", "SIGKILL", 3.0)], 0) == [3.0]


def test_ready_is_told_of_the_death_after_which_health_said_no() -> None:
    deaths = [Death("stage 0", "SIGKILL", 10.0), Death("head", "SIGKILL", 20.0), Death("node", "SIGKILL", 30.0)]
    Health([(1.0, True), (11.0, False), (15.0, True), (31.0, False)]).mark(deaths)
    assert [(d.down_after_s, d.ready_after_s) for d in deaths] == [(1.0, 5.0), (None, None), (1.0, None)]


@pytest.mark.parametrize("text", ["", "stage", "stage=0", "stage=-1", "stage=inf", "stage=x", "nobody=1", "stage=nan"])
def test_shares_of_nobody_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        shares(text)


def test_only_right_answers_count_as_goodput() -> None:
    question = Question.of("m", Arrival(0, "a b", 4), chat=True)
    known = Known(question, "text", "length", (1,), (2, 3))
    ended = [
        Judged("correct", attempt=1, out_ids=(2, 3)),
        Judged("parted", attempt=0, out_ids=(2, 4), parting=1),
        Judged("wrong", "another token", 0, (9, 9), 0),
        Judged("failed", "it broke"),
        Judged("refused", "status 503"),
    ]
    load = Load(
        20.0, 0.0, 2.0, [(known, reply([1.0], 2.0), judged) for judged in ended], [Death("head", "SIGKILL", 9.0)]
    )
    figures = summary(load)
    assert [figures[name] for name in ("correct", "parted", "wrong", "failed", "refused", "again")] == [1] * 6
    assert (figures["right_percent"], figures["goodput_tokens_per_s"], figures["died"]) == (40.0, 2.0, 1)
    assert len(table([figures | {"goodput_percent": 50.0}])) == 2


def test_a_run_can_be_drawn_even_where_nobody_stalled(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.plot", reason="needs the extra [bench]", exc_type=ImportError)
    calm = summary(Load(None, 0.0, 2.0))
    churned = calm | {"every_s": 20.0, "stall_s": {"p50": 1.0, "p90": 2.0, "p99": 3.0}}
    for runs in ([calm], [calm, churned]):
        figures = {"model": "tiny", "clients": 4, "stages": 2, "signal": "SIGKILL", "runs": runs}
        assert plot.picture(Result("churn", figures), tmp_path).exists()


def test_the_dashboard_is_found_in_a_coloured_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Started Ray. View the dashboard at \x1b[1m\x1b[32mhttp://127.0.0.1:8266 \x1b[39m\x1b[22m\n")
    assert dashboard_of(log) == "http://127.0.0.1:8266"
    log.write_text("nothing yet")
    with pytest.raises(LookupError, match="does not say"):
        dashboard_of(log)
