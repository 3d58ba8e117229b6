"""Every result that is kept can be drawn, in one layout, small enough to be kept too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import RESULTS, Result, save

plot = pytest.importorskip("benchmarks.plot", reason="needs the extra [bench]", exc_type=ImportError)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_the_newest_result_of_every_benchmark_can_be_drawn(path: Path, tmp_path: Path) -> None:
    picture = plot.picture(plot.newest(path), tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 120_000


def test_a_benchmark_without_a_drawing_of_its_own_gets_a_plain_one(tmp_path: Path) -> None:
    save(
        Result("unknown", {"first_ms": 2.5, "both": {"second_ms": 3.5, "rate_tokens_per_s": 9}, "name": "x"}), tmp_path
    )
    assert plot.picture(plot.newest(tmp_path / "unknown.jsonl"), tmp_path).exists()


@pytest.mark.parametrize("line", ["", "{}\n", "not json\n", '{"benchmark": "soak", "figures": {}}\n'])
def test_a_result_that_cannot_be_drawn_is_named(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "soak.jsonl").write_text(line)
    monkeypatch.setattr("sys.argv", ["plot", "soak", "--results", str(tmp_path)])
    assert plot.main() == 1
    assert "soak: its newest result cannot be drawn" in capsys.readouterr().err
