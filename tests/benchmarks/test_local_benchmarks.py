"""The scripts that ask a LocalPipeline give figures on a tiny model too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import cold_start, exact_windows, localisation, prefill, prefix_cache, receipts_cost, speculate
from benchmarks.models import PublishedModel, published
from benchmarks.transformers_peer import generate_batch
from benchmarks.workload import poisson

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PublishedModel:
    return published(tmp_path_factory.mktemp("model"), "tiny")


def test_receipts_are_left_out_of_one_pipeline_and_not_of_the_other(model: PublishedModel) -> None:
    """`compare` asserts that; the witness's time is a share of the process's."""
    figures = asyncio.run(receipts_cost.compare(model, 2, pairs=2, n=3, tokens=6))
    assert len(figures["with_receipts_tokens_per_s"]) == 2 == len(figures["without_receipts_tokens_per_s"])
    assert 0 < figures["witness_share_of_cpu_percent"] < 100


def test_signatures_for_rows_on_their_way_are_made_in_one_pipeline_and_not_in_the_other(model: PublishedModel) -> None:
    signed = asyncio.run(receipts_cost.delivering(model, 2, pairs=2, n=3, tokens=6))
    assert signed["delivery_ratio_lowest"] <= signed["delivery_ratio_median"] <= signed["delivery_ratio_highest"]


def test_receipts_of_44_and_of_2000_rows_are_checked(model: PublishedModel) -> None:
    kept = asyncio.run(receipts_cost.keeping(model, 2, rounds=2, n=3, tokens=6))
    assert 0 < kept["retention_share_of_cpu_percent"] < 100 and kept["retained_bytes_per_stage"] > 0
    cost = asyncio.run(receipts_cost.auditing(model, 2, n=3, tokens=6))
    assert cost["served_cpu_ms_a_row"] > 0 < cost["audited_cpu_ms_a_row"]
    times = asyncio.run(receipts_cost.check_times(model, repeats=9))
    assert set(times) == {"44_rows", "2000_rows"}
    assert 0 < times["44_rows"]["p50"] < times["2000_rows"]["p50"]


def test_prompts_are_timed_by_length_and_budget(model: PublishedModel) -> None:
    rates = asyncio.run(prefill.measure(model, [20, 50], [16, 64], 1, 1))
    assert set(rates) == {"step of 16", "step of 64", "transformers"}
    assert all(set(by_length) == {"20", "50"} and min(by_length.values()) > 0 for by_length in rates.values())


def test_prompts_that_miss_are_as_long_as_those_that_are_reused(model: PublishedModel) -> None:
    figures = asyncio.run(prefix_cache.measure(model, 2, 3, 2, (40, 5, 4), anyway=True))
    assert figures is not None
    for load in figures.values():
        assert load["missed"]["prompt_tokens"] == load["reused"]["prompt_tokens"]
        assert load["missed"]["hits"] <= load["reused"]["hits"]


def test_guesses_leave_answers_as_they_are(model: PublishedModel) -> None:
    figures = asyncio.run(speculate.measure(model, 2, guesses=4, pairs=1, tokens=24))
    assert set(figures) == set(speculate.ASKED)
    for of_prompt in figures.values():
        assert of_prompt["same_answer"] and of_prompt["ratio"] > 0 and of_prompt["answer_tokens"] > 1


def test_windows_have_equal_bits_in_every_process_and_an_unequal_one_is_counted(
    model: PublishedModel, tmp_path: Path
) -> None:
    """Against another machine's, whose hashes are a file: here one that has another first window."""
    first = exact_windows.Run(str(model.root / "store"), str(model.manifest.cid), "float32", 1, 4, 40, 0, 0)
    kept = tmp_path / "hashes"
    found = exact_windows.equal_windows(first, [1, 4], [], kept, None)
    assert (found["windows"], found["windows_unequal"]) == (8, 0) and found["runs"]["batch 4"]["spans_of_one_row"] > 0
    theirs = json.loads(kept.read_text())
    kept.write_text(json.dumps(theirs | {"windows": ["another", *theirs["windows"][1:]]}))
    assert exact_windows.equal_windows(first, [], [], None, kept)["windows_unequal_to_other_machine"] == 1


def test_the_parts_of_a_cold_start_add_up(model: PublishedModel) -> None:
    parts = cold_start.fresh_process(model, 2)
    total, inside = parts.pop("total_s"), ("blocks_read_and_verified_s", "engines_s")
    assert sum(s for name, s in parts.items() if name not in inside) == pytest.approx(total, abs=0.02)
    assert parts["blocks_read_and_verified_s"] <= parts["load_s"] + parts["manifest_s"]
    assert cold_start.imports("json")["total_s"] < 5


def test_the_peer_answers_every_request() -> None:
    figures = generate_batch("tiny", poisson(None, 3, "8", "6", 0))
    assert (figures["errors"], figures["answer_tokens"]) == (0, 18)


def test_every_culprit_is_blamed_and_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of the ten thousand; what was not as it should be is printed."""
    seen = localisation.tallied(120, seed=1)
    assert seen["right"] == 120, capsys.readouterr().out
    assert seen["resumed"] and seen["rows_reused"]
