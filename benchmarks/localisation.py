"""Does an audit of every stage blame those that cheat, all of them, and nobody else?

    python -m benchmarks.localisation [--transcripts 10000]

A tiny random model in float32, 3 to 5 stages of this process, none to three of which cheat in ways of their own
(engine/dishonest.py). Requests run as a scheduler makes them run: together, in pages so scarce that some begin anew,
behind beginnings that another one computed, with guesses; every fourth is broken off after some tokens, and goes on in
another pipeline with other culprits, as after the death of a Head. Every stage of every answer is then computed again
from its rows (audit/replay.py) and judged by a calibration of other requests.

right: answers of which exactly the culprits were found at fault. It fails unless all are, and unless each of these
cases was among them. The seed makes the plan; timing decides which requests meet.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Result, save
from serve_app.audit.auditor import Auditor
from serve_app.audit.calibration import Calibration, calibrate
from serve_app.audit.verdict import judge
from serve_app.engine.dishonest import DISHONEST
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions
from serve_app.errors import PipelineError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.events import Begun
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.pipeline.running import ATTEMPTS
from serve_app.rehearsal import Rehearsed, loader, with_rows
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.signing import Signer
from shard_tools.store.block_store import BlockStore
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

LAYERS, PAGE = 6, 16
BATCH = 40  # requests of one pair of pipelines
AT_ONCE = 10
SHARED = tuple(range(40, 40 + 2 * PAGE))  # a beginning that half of all prompts have
OPTIONS = LoadOptions("cpu", "float32", PAGE, 1, engine=TORCH)
CALIBRATED_BY = 40  # honest answers
WAYS = ("resumed", "begun_anew", "rows_reused", "guesses", "guesses_right")  # that rows must have taken


@dataclass(frozen=True, slots=True)
class Told:
    """An answer with its rows, who computed it wrongly, and what happened to it."""

    answer: Rehearsed
    culprits: frozenset[int]
    resumed: bool  # on the way, by another pipeline


class _House:
    """One pipeline whose stages keep their rows."""

    def __init__(
        self, store: BlockStore, manifest: Manifest, stages: int, cheats: Mapping[int, str], draw: random.Random
    ) -> None:
        self.culprits = frozenset(cheats)
        scarce, self.guesses = draw.random() < 0.5, draw.random() < 0.5
        limits = LocalLimits(
            n_pages=18 if scarce else 200,  # of which an answer takes two to nine
            max_running=3 if self.guesses else AT_ONCE,  # many at once have no room for guesses
            max_waiting=4 * BATCH,
            prefix_cache=draw.random() < 0.5,
            speculate=4 * self.guesses,
            retain_bytes=1 << 28,
        )
        self.pipeline = LocalPipeline(
            store, manifest, stages=stages, options=OPTIONS, limits=limits, load=loader(stages, cheats)
        )

    async def run(self, request: GenerationRequest, begun: Begun | None, tokens: int | None) -> Begun | bytes:
        """Its receipt; or, once so many tokens are there, what another pipeline goes on with."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        nonce = self.pipeline.head.submit(request, events.put_nowait, begun)
        drawn: list[int] = []
        while True:
            match await events.get():
                case TokensEvent() as event:
                    drawn += event.tokens
                    if tokens is not None and len(drawn) >= tokens:
                        self.pipeline.head.stop(request.id, keep=False)
                        return Begun(tuple(drawn), False, nonce, 1)
                case FinishedEvent() as event:
                    return event.receipt
                case FailedEvent() as event:
                    raise PipelineError(f"{request.id}: {event.message}")


def asked(manifest: Manifest, number: int, draw: random.Random) -> GenerationRequest:
    """Some fifty tokens of prompt, half of them as others', and up to as many of an answer, half of them greedy."""
    own = tuple(draw.randrange(3, 500) for _ in range(draw.randrange(17, 30)))
    prompt = (SHARED if draw.random() < 0.5 else ()) + own * draw.choice((1, 2))  # said twice, it can be guessed
    # Some say a few tokens again and again, as only such an answer is guessed at.
    few = draw.sample(range(3, 500), draw.choice((0, 0, 1, 2)))
    bias = tuple((id, 60_000_000) for id in sorted(few))
    sampling = Sampling(draw.choice((0, 1_000_000)), seed=number, logit_bias=bias)
    id, tokens = RequestId(f"transcript-{number}"), draw.randrange(6, 50)
    return GenerationRequest(id, manifest.cid, prompt, tokens, sampling, (), b"", fresh_salt())


def cheats_of(stages: int, most: int, draw: random.Random) -> dict[int, str]:
    """By stage."""
    at = draw.sample(range(stages), draw.randint(0, most))
    return {stage: draw.choice(sorted(DISHONEST)) for stage in at}


async def transcripts(
    store: BlockStore, manifest: Manifest, stages: int, first: int, draw: random.Random, most: int, count: int = BATCH
) -> tuple[list[Told], Counter[str]]:
    """The answers of two pipelines, and how often their rows took unusual ways."""
    one, other = (_House(store, manifest, stages, cheats_of(stages, most, draw), draw) for _ in range(2))
    turn = asyncio.Semaphore(2 * AT_ONCE)

    async def answer(number: int) -> Told:
        request, breaks = asked(manifest, number, draw), draw.random() < 0.25
        async with turn:
            got = await one.run(request, None, 3 if breaks else None)
            if isinstance(got, bytes):
                return Told(with_rows(one.pipeline, got, keep=True), one.culprits, resumed=False)
            receipt = await other.run(request, got, None)
            assert isinstance(receipt, bytes)
            return Told(with_rows(other.pipeline, receipt, keep=True), other.culprits, resumed=True)

    try:
        told = list(await asyncio.gather(*(answer(first + i) for i in range(count))))
        seen: Counter[str] = Counter(resumed=sum(t.resumed for t in told))
        seen["begun_anew"] = sum(t.answer.receipt.receipt.attempt % ATTEMPTS > 0 for t in told)
        for house in (one, other):
            witness, scheduler = house.pipeline.stages[0].witness, house.pipeline.head.status()
            seen["rows_reused"] += witness.rows_reused
            for what in ("guesses", "guesses_right"):
                count_of = scheduler[what]
                assert isinstance(count_of, int)
                seen[what] += count_of
        return told, seen
    finally:
        one.pipeline.close()
        other.pipeline.close()


def calibrations(auditor: Auditor, told: Sequence[Told], stages: int) -> list[Calibration]:
    """Of every stage, by honest answers."""
    made = []
    for stage in range(stages):
        said = [t.answer.receipt.statements[stage] for t in told]
        made.append(calibrate(said, *auditor.compare(said, [t.answer.records[stage] for t in told])))
    return made


def findings(auditor: Auditor, told: Sequence[Told], by: Sequence[Calibration]) -> list[dict[int, str]]:
    """Of every answer, by stage."""
    found: list[dict[int, str]] = [{} for _ in told]
    for stage, calibration in enumerate(by):
        said = [t.answer.receipt.statements[stage] for t in told]
        sent, replays = auditor.compare(said, [t.answer.records[stage] for t in told])
        for i, (rows, replayed) in enumerate(zip(sent, replays, strict=True)):
            calibration.require_for(said[i], replayed.profile)
            judgement = judge(calibration.errors(rows, replayed), calibration)
            found[i][stage] = judgement.finding
    return found


def tallied(transcripts_wanted: int, seed: int) -> Counter[str]:
    """What came of so many."""
    draw, began = random.Random(seed), time.perf_counter()
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_tiny_checkpoint(Path(folder) / "checkpoint", layers=LAYERS))
        manifest = split(checkpoint, store, "tiny", "float32")
    auditor = Auditor(store, manifest, OPTIONS, (), Signer.fresh())
    by: dict[int, list[Calibration]] = {}
    for stages in (3, 4, 5):
        told, _ = asyncio.run(transcripts(store, manifest, stages, -CALIBRATED_BY, draw, 0, CALIBRATED_BY))
        by[stages] = calibrations(auditor, told, stages)
    seen: Counter[str] = Counter(honest_stages_blamed=0, culprits_missed=0, honest_stages_suspected=0)
    for first in range(0, transcripts_wanted, BATCH):
        stages, count = draw.choice((3, 4, 5)), min(BATCH, transcripts_wanted - first)
        told, ways = asyncio.run(transcripts(store, manifest, stages, first, draw, 3, count))
        seen.update(ways)
        for one, found in zip(told, findings(auditor, told, by[stages]), strict=True):
            faults = frozenset(stage for stage, finding in found.items() if finding == "fault")
            suspects = frozenset(stage for stage, finding in found.items() if finding == "suspect")
            seen["right"] += faults == one.culprits
            seen["honest_stages_blamed"] += len(faults - one.culprits)
            seen["honest_stages_suspected"] += len(suspects - one.culprits)
            seen["culprits_missed"] += len(one.culprits - faults)
            seen["stages"] += stages
            seen[f"transcripts_with_{len(one.culprits)}_culprits"] += 1
            if faults != one.culprits:
                print(f"culprits {sorted(one.culprits)}, resumed {one.resumed}: {found}", flush=True)
        if (first // BATCH + 1) % 10 == 0:
            print(f"{first + count} after {time.perf_counter() - began:.0f} s, {seen['right']} right", flush=True)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcripts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    began = time.perf_counter()
    logging.getLogger("serve_app.pipeline.head").setLevel(logging.CRITICAL)  # pipelines are closed by the hundred
    seen = tallied(a.transcripts, a.seed)
    figures = {
        "model": f"tiny Llama, {LAYERS} layers, random, float32",
        "transcripts": a.transcripts,
        "seconds": round(time.perf_counter() - began),
        **{name: seen[name] for name in sorted(seen)},
    }
    save(Result("localisation", figures), a.out)
    missing = [name for name in WAYS if not seen[name]]
    if missing:
        print(f"none of these happened: {', '.join(missing)}")
    return int(seen["right"] != a.transcripts or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
