"""The load against a real `llmd serve`: rows and receipts add up, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.server import OwnServer


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_load_through_http_adds_up_and_its_server_is_gone_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[OwnServer] = []
    monkeypatch.setattr(serving, "OwnServer", lambda *a, **k: servers.append(OwnServer(*a, **k)) or servers[-1])
    load = ["--own-model", "tiny", "--rates", "4", "inf", "--requests", "6", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["serving", *load])
    assert serving.main() == 0
    figures = json.loads((tmp_path / "serving.jsonl").read_text())["figures"]
    for run in figures["runs"]:
        assert (run["errors"], run["receipts"]) == (0, 6)
        assert run["rows_hashed"] == [run["rows_run"]] * 2
    (server,) = servers
    assert server.processes() == {} and not server.root.exists()


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = OwnServer("tiny", 2, no_such_key=1)
    with pytest.raises(RuntimeError, match="no_such_key"), server:
        pass
    assert not server.root.exists()
