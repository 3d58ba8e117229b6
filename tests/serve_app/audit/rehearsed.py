"""A tiny model through two stages of this process, with its rows; honest, calibrated, and with a stage that cheats."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.audit.auditor import Auditor
from serve_app.audit.calibration import Calibration, calibrate
from serve_app.audit.exact import ExactReplay
from serve_app.engine.dishonest import load_cheat
from serve_app.engine.engine import Engine
from serve_app.engine.engines import TORCH
from serve_app.engine.host_rows import HostRows
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.record import StageRecord
from serve_app.messages.request import (
    Assurance,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    fresh_salt,
)
from serve_app.pipeline.assurance import NoAudits
from serve_app.receipts.check import CheckedReceipt, check
from serve_app.receipts.identity import Session
from serve_app.rehearsal import Rehearsed, rehearse
from shard_tools.canonical import Value
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.signing import PublicKey, Signer
from shard_tools.store.block_store import BlockStore
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

STAGES = 2
OPTIONS = LoadOptions("cpu", "float32", 4, None, engine=TORCH)
REPLAY = LoadOptions("cpu", "float32", 16, None, engine=TORCH)
FIXED = replace(OPTIONS, deterministic=True)
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


@functools.cache
def fixed(cheat: str | None = None, stage: int = 1) -> Rehearsed:
    """One answer of a pipeline whose bits depend on nothing else; with a stage that cheats under its own profile."""
    cheats = {} if cheat is None else {stage: cheat}
    return rehearse(*model(), prompts(50, 1), stages=STAGES, options=FIXED, tokens=14, cheats=cheats)[0]


@functools.cache
def exact_auditor() -> Auditor:
    """One that repeats those bits, and judges all else by calibrations."""
    return Auditor(*model(), REPLAY, calibrations(), AUDITOR, ExactReplay(*model(), FIXED))


@dataclass(frozen=True)
class Answer:
    """What a stage and a Head hold of one answer."""

    bundle: bytes
    checked: CheckedReceipt
    records: tuple[StageRecord, ...]


@dataclass(frozen=True)
class House:
    """Answers of a pipeline of this process, with the sessions of its stages, which can show its rows."""

    operator: PublicKey
    node: PublicKey
    sessions: tuple[Session, ...]
    answers: tuple[Answer, ...]


@functools.cache
def whole_house(count: int = 2, sampling: Sampling = Sampling(0), cheat: str | None = None) -> House:  # noqa: B008
    """Made once; its stages' sessions are opened anew, as those of a later epoch are. cheat: of the last stage."""
    return asyncio.run(_serve(prompts(70, count), 9, sampling, cheat, OPTIONS, LocalLimits(n_pages=64)))[0]


@functools.cache
def exact_house() -> House:
    """One answer whose bits were promised. By the request alone: this pipeline has no desk."""
    return asyncio.run(_serve(prompts(70, 1), 9, Sampling(0), None, FIXED, LocalLimits(n_pages=64), "exact"))[0]


class _Granted(NoAudits):
    def admit(self, request: GenerationRequest, *, resumed: bool) -> None:
        """Whatever it asks for."""


def sharing_house(sampling: Sampling) -> tuple[House, dict[str, Value]]:
    """The same long prompt three times: its beginning is computed once, and what comes is guessed. And its status."""
    same = [[3 + k % 7 for k in range(40)]] * 3
    limits = LocalLimits(n_pages=64, prefix_cache=True, speculate=4)
    return asyncio.run(_serve(same, 48, sampling, None, replace(OPTIONS, page_size=16), limits))


async def _serve(
    asked: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    cheat: str | None,
    options: LoadOptions,
    limits: LocalLimits,
    assurance: Assurance = "signed",
) -> tuple[House, dict[str, Value]]:
    def load(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> Engine:
        if cheat is None or stop < manifest.n_layers:
            return HostRows(load_engine(store, manifest, start, stop, options))
        return load_cheat(store, manifest, start, stop, options, cheat)

    limits = replace(limits, retain_bytes=1 << 24)
    pipeline = LocalPipeline(*model(), stages=STAGES, options=options, limits=limits, load=load)
    pipeline.head._audits = _Granted()
    try:
        answers = []
        for i, prompt in enumerate(asked):
            id, salt = RequestId(f"a{i}"), fresh_salt()
            request = GenerationRequest(
                id, model()[1].cid, tuple(prompt), tokens, sampling, (), b"", salt, assurance=assurance
            )
            (*_, last) = [event async for event in pipeline.generate(request)]
            assert isinstance(last, FinishedEvent)
            checked = check(last.receipt, pipeline.operator.public, now_s=int(time.time()))
            kept = []
            for said in checked.statements:
                retention = pipeline.stages[said.stage].retention
                record = retention.read(said.request_hash, said.attempt) if retention else None
                assert record is not None
                kept.append(record)
            answers.append(Answer(last.receipt, checked, tuple(kept)))
        now_s = int(time.time())
        sessions = tuple(pipeline.node.open_session("stage", 2, now_s, 3600) for _ in range(STAGES))
        return House(pipeline.operator.public, pipeline.node.key, sessions, tuple(answers)), pipeline.head.status()
    finally:
        pipeline.close()
