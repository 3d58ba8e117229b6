"""A tiny model through two stages of this process, with its rows; honest, calibrated, and with a stage that cheats."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serve_app.audit.auditor import Auditor
from serve_app.audit.calibration import Calibration, calibrate
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions
from serve_app.rehearsal import Rehearsed, rehearse
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.signing import Signer
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

STAGES = 2
OPTIONS = LoadOptions("cpu", "float32", 4, None, engine=TORCH)
REPLAY = LoadOptions("cpu", "float32", 16, None, engine=TORCH)
AUDITOR, OTHER = Signer.from_seed(b"a" * 32), Signer.from_seed(b"b" * 32)


@functools.cache
def model() -> tuple[MemoryStore, Manifest]:
    """Four layers in float32: honest stages err by 1e-7, so small a model finds every cheat at once."""
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_tiny_checkpoint(Path(folder) / "checkpoint", layers=4))
        return store, split(checkpoint, store, "tiny", "float32")


def prompts(first: int, count: int) -> list[Sequence[int]]:
    """Different ones for different numbers."""
    return [[3 + (first + i) * 7 % 400 + k * (5 + i % 11) % 100 for k in range(10)] for i in range(count)]


@functools.cache
def honest() -> tuple[Rehearsed, ...]:
    """What calibrations are made of."""
    return tuple(rehearse(*model(), prompts(0, 16), stages=STAGES, options=OPTIONS, tokens=14))


def answered(cheats: dict[int, str] | None = None, count: int = 1) -> list[Rehearsed]:
    """Other requests than those of the calibration."""
    return rehearse(*model(), prompts(50, count), stages=STAGES, options=OPTIONS, tokens=14, cheats=cheats)


@functools.cache
def calibrations() -> tuple[Calibration, ...]:
    """Of both stages."""
    replayer, made = Auditor(*model(), REPLAY, (), AUDITOR), []
    for stage in range(STAGES):
        statements = [r.receipt.statements[stage] for r in honest()]
        made.append(calibrate(statements, *replayer.compare(statements, [r.records[stage] for r in honest()])))
    return tuple(made)


@functools.cache
def auditor(signer: Signer = AUDITOR) -> Auditor:
    """One that can judge both stages."""
    return Auditor(*model(), REPLAY, calibrations(), signer)
