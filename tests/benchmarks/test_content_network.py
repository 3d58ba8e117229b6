"""The benchmark of the content network gives figures on a tiny model too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.content_network import measure

pytestmark = pytest.mark.slow


def test_nodes_that_join_at_once_take_the_model_from_outside_once(tmp_path: Path) -> None:
    figures = measure("join", tmp_path, "tiny", nodes=3, blocks=0)
    assert 0.9 < figures["outside_over_model"] <= 1.0 and figures["nodes"] == 3


def test_fine_tunes_cost_what_they_change(tmp_path: Path) -> None:
    """In a model this small a plain chunker shares nothing."""
    figures = measure("dedup", tmp_path, "tiny", nodes=0, blocks=0)
    assert figures["norms"]["ours_percent"] < 3 < figures["q_and_v_merged_lora"]["ours_percent"] < 20
    assert all(row["ours_percent"] < row["plain_1_mib_percent"] for row in figures.values() if isinstance(row, dict))


def test_copies_and_blocks_over_http_have_rates(tmp_path: Path) -> None:
    assert measure("directory", tmp_path / "a", "tiny", 0, 0)["fetch_mb_per_s"] > 0
    assert measure("http", tmp_path / "b", "tiny", 0, blocks=5)["verified_4_threads_mb_per_s"] > 0


def test_a_gateway_is_fetched_from_in_both_ways(tmp_path: Path) -> None:
    figures = measure("gateway", tmp_path, "tiny", 0, 0)
    assert all(figures[f"late_{ms}_ms"][how] > 0 for ms in (0, 5, 50) for how in ("streams", "blocks"))
