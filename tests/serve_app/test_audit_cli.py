"""What an operator types before a pipeline can audit itself, and that the config takes what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.audit.band import DrawBand
from serve_app.audit.calibration import Calibration
from serve_app.cli import app
from serve_app.config import AuditConfig
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.cid import Cid
from shard_tools.store.directory import DirectoryStore
from tests.tiny_models import write_tiny_checkpoint


def calibrate(folder: Path, *more: str) -> tuple[int, str]:
    store = DirectoryStore(folder / "store")
    manifest = split(open_checkpoint(write_tiny_checkpoint(folder / "checkpoint", layers=2)), store, "tiny", "float32")
    (folder / "text").write_text(" ".join(f"word {i * 7919 % 1000}" for i in range(2000)))
    words = ["audit", "calibrate", "--store", str(folder / "store"), "--manifest", str(manifest.cid)]
    done = CliRunner().invoke(app, [*words, "--text", str(folder / "text"), *more])
    return done.exit_code, done.output


@pytest.mark.slow
def test_one_command_makes_what_layers_and_draws_are_judged_by(tmp_path: Path) -> None:
    """A calibration of each stage and a band, in the store, of the same profiles; the last lines are for the config."""
    code, said = calibrate(tmp_path, "--requests", "12", "--tokens", "20")
    assert code == 0, said
    config = AuditConfig(**yaml.safe_load(said[said.index("  audit:") :])["audit"])
    store = DirectoryStore(tmp_path / "store")
    made = [Calibration.decode(store.get(Cid.parse(cid))) for cid in config.calibration]
    (band,) = (DrawBand.decode(store.get(Cid.parse(cid))) for cid in config.band)
    assert [(c.start, c.stop) for c in made] == [(0, 1), (1, 2)]
    assert (band.draws, band.prover, band.manifest) == (4 * 240, made[-1].prover, made[-1].manifest)


def test_too_few_requests_make_no_band(tmp_path: Path) -> None:
    code, said = calibrate(tmp_path, "--requests", "2", "--tokens", "20")
    assert code == 2 and "160 draws are too few to calibrate by" in said
