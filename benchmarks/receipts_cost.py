"""What do receipts cost? Tokens per second as they are, against the same pipeline without hashing and signing.

    python -m benchmarks.receipts_cost [--model smollm2] [--stages 2] [--pairs 5] [--requests 8] [--tokens 24]

Both pipelines stand in one process and answer the same greedy requests in turn, so that a slow minute of the machine
meets both; the ratio of each pair is kept. Because a few per cent drown in such a machine's noise, the processor time
that the witnesses' threads take is counted as well. The client's check is timed on receipts of 44 and of 2000 rows,
with nothing remembered from issuing them. Keeping rows for audits is timed in a pipeline of its own, as processor time;
so is an audit of one stage of every one of its answers, each alone, as a running auditor does it: against the processor
time of serving them, `--requests` at once.
On a CPU: where an engine hashes by itself, leaving it out takes more.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serve_app.local
import serve_app.pipeline.stage
from benchmarks.models import PublishedModel, greedy, published, random_prompt
from benchmarks.report import Result, save
from benchmarks.spread import percentiles
from serve_app.audit.auditor import Auditor
from serve_app.audit.calibration import calibrate
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FailedEvent, FinishedEvent, GenerationRequest, TokensEvent
from serve_app.messages.step import StepPlan
from serve_app.pipeline.head import Head
from serve_app.pipeline.retention import Retention
from serve_app.pipeline.witness import Witness
from serve_app.receipts import rows
from serve_app.receipts.check import check
from serve_app.rehearsal import with_rows
from serve_app.scheduling.scheduler import Committed
from shard_tools.signing import Signer

CHECKED = ((30, 15), (1500, 501))  # prompt and answer tokens that make 44 and 2000 rows
CHECK_BAR_MS = 5.0
AUDITOR = LoadOptions("cpu", "float32", 16, 1, engine=TORCH)  # as a cluster's auditor has it


class BlindWitness:
    """Stands where a Witness stands, looks at nothing and signs nothing."""

    rows_hashed = rows_reused = rows_abandoned = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def saw(self, plan: StepPlan, output: object) -> None:
        """Nothing."""

    def lost(self, plan: StepPlan) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class UnsignedHead(Head):
    """Ends a request when its last token is drawn: no roots are waited for, and no receipt is issued."""

    def _commit(self, committed: Committed) -> None:
        super()._commit(committed)
        running = self._running.get(committed.seq)
        if running is not None and running.reason is not None:
            self._end(committed.seq, FinishedEvent(running.request.id, running.reason, b""))


class TimedWitness(Witness):
    """A Witness that counts its thread's processor time."""

    cpu_s = 0.0

    def _hash(self, *args: Any) -> None:
        began = time.thread_time()
        super()._hash(*args)
        self.cpu_s += time.thread_time() - began

    def _end_and_sign(self, *args: Any, **named: Any) -> None:
        began = time.thread_time()
        super()._end_and_sign(*args, **named)
        self.cpu_s += time.thread_time() - began


class TimedRetention(Retention):
    """A Retention that counts its writer's processor time."""

    cpu_s = 0.0

    def saw(self, *args: Any) -> None:
        began = time.thread_time()
        super().saw(*args)
        self.cpu_s += time.thread_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = published(root / "model", a.model)
        figures: dict[str, Any] = {"model": model.manifest.name, "stages": a.stages}
        figures |= asyncio.run(compare(model, a.stages, a.pairs, a.requests, a.tokens))
        figures |= asyncio.run(delivering(model, a.stages, a.pairs, a.requests, a.tokens))
        figures |= asyncio.run(keeping(model, a.stages, a.pairs, a.requests, a.tokens))
        figures |= asyncio.run(auditing(model, a.stages, a.requests, a.tokens))
        small = model if a.model == "tiny" else published(root / "tiny", "tiny")
        figures["check_ms"] = asyncio.run(check_times(small))
    save(Result("receipts_cost", figures), a.out)
    typical = figures["check_ms"]["44_rows"]["p50"]
    if typical > CHECK_BAR_MS:
        print(f"checking a receipt of 44 rows takes {typical} ms, more than {CHECK_BAR_MS}", file=sys.stderr)
    return int(typical > CHECK_BAR_MS)


async def compare(model: PublishedModel, stages: int, pairs: int, n: int, tokens: int) -> dict[str, Any]:
    """Tokens per second with and without, in turn; the first pair warms up and is not counted."""
    with _parts(TimedWitness, Head):
        signed = model.pipeline(stages)
    with _parts(BlindWitness, UnsignedHead):
        unsigned = model.pipeline(stages)
    draw = random.Random(0)
    prompts = [random_prompt(draw, model.manifest, draw.randint(16, 64)) for _ in range(n)]
    with_s: list[float] = []
    without_s: list[float] = []
    witness_s = total_s = 0.0
    for i in range(pairs + 1):
        order = [(signed, with_s, True), (unsigned, without_s, False)]
        for pipeline, times, receipts in order if i % 2 else reversed(order):
            cpu, witnesses, began = time.process_time(), witnesses_s(signed), time.perf_counter()
            requests = [greedy(model.manifest, prompt, tokens) for prompt in prompts]
            answers = await asyncio.gather(*(ended(pipeline, r) for r in requests))
            assert all(len(answer) == tokens and bool(receipt) == receipts for answer, receipt in answers)
            if i:
                times.append(time.perf_counter() - began)
            if i and receipts:
                witness_s += witnesses_s(signed) - witnesses
                total_s += time.process_time() - cpu
    signed.close()
    unsigned.close()
    ratios = [without / with_ for with_, without in zip(with_s, without_s, strict=True)]
    total = n * tokens
    return {
        "requests": n,
        "tokens_each": tokens,
        "with_receipts_tokens_per_s": [round(total / s, 2) for s in with_s],
        "without_receipts_tokens_per_s": [round(total / s, 2) for s in without_s],
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_lowest": round(min(ratios), 4),
        "ratio_highest": round(max(ratios), 4),
        "witness_share_of_cpu_percent": round(100 * witness_s / total_s, 2),
    }


async def delivering(model: PublishedModel, stages: int, pairs: int, n: int, tokens: int) -> dict[str, Any]:
    """Tokens per second with rows signed for on their way between stages, and without, in turn; as in `compare`."""
    with _parts(TimedWitness, Head):
        plain = model.pipeline(stages)
        delivered = model.pipeline(stages, LocalLimits(deliveries=True))
    draw = random.Random(0)
    prompts = [random_prompt(draw, model.manifest, draw.randint(16, 64)) for _ in range(n)]
    spent: dict[bool, list[float]] = {False: [], True: []}
    share = {False: 0.0, True: 0.0}
    for i in range(pairs + 1):
        order = [(plain, False), (delivered, True)]
        for pipeline, signs in order if i % 2 else reversed(order):
            cpu, witnesses, began = time.process_time(), witnesses_s(pipeline), time.perf_counter()
            await asyncio.gather(*(ended(pipeline, greedy(model.manifest, prompt, tokens)) for prompt in prompts))
            if i:
                spent[signs].append(time.perf_counter() - began)
                share[signs] += (witnesses_s(pipeline) - witnesses) / (time.process_time() - cpu) / pairs
    plain.close()
    delivered.close()
    ratios = [without / with_ for with_, without in zip(spent[True], spent[False], strict=True)]
    return {
        "delivery_ratio_median": round(statistics.median(ratios), 4),
        "delivery_ratio_lowest": round(min(ratios), 4),
        "delivery_ratio_highest": round(max(ratios), 4),
        "delivery_share_of_cpu_percent": round(100 * (share[True] - share[False]), 2),
    }


async def keeping(model: PublishedModel, stages: int, rounds: int, n: int, tokens: int) -> dict[str, Any]:
    """What share of the processor's time goes into keeping rows; the first round warms up and is not counted."""
    serve_app.local.Retention = TimedRetention  # type: ignore[misc]
    try:
        pipeline = model.pipeline(stages, LocalLimits(retain_bytes=1 << 30))
    finally:
        serve_app.local.Retention = Retention  # type: ignore[misc]
    kept: list[Any] = [stage.retention for stage in pipeline.stages]
    draw = random.Random(0)
    prompts = [random_prompt(draw, model.manifest, draw.randint(16, 64)) for _ in range(n)]
    for i in range(rounds + 1):
        if i == 1:
            cpu, keeping = time.process_time(), sum(retention.cpu_s for retention in kept)
        await asyncio.gather(*(ended(pipeline, greedy(model.manifest, prompt, tokens)) for prompt in prompts))
    share = (sum(retention.cpu_s for retention in kept) - keeping) / (time.process_time() - cpu)
    pipeline.close()
    return {
        "retention_share_of_cpu_percent": round(100 * share, 2),
        "retained_bytes_per_stage": max(retention.bytes for retention in kept),
    }


async def auditing(model: PublishedModel, stages: int, n: int, tokens: int) -> dict[str, Any]:
    """Processor time of replaying one stage of every answer, and of serving them; rows as chats have them."""
    pipeline = model.pipeline(stages, LocalLimits(retain_bytes=1 << 30))
    draw = random.Random(0)
    prompts = [random_prompt(draw, model.manifest, draw.randint(48, 128)) for _ in range(n)]
    served_s, answers = 0.0, []
    for _ in range(2):  # the first warms up
        began = time.process_time()
        answers = await asyncio.gather(*(ended(pipeline, greedy(model.manifest, p, tokens)) for p in prompts))
        served_s = time.process_time() - began
    found = [with_rows(pipeline, receipt) for _, receipt in answers]
    pipeline.close()
    replayer, calibrations = Auditor(model.store, model.manifest, AUDITOR, (), Signer.fresh()), []
    for stage in range(stages):
        said = [one.receipt.statements[stage] for one in found]
        calibrations.append(calibrate(said, *replayer.compare(said, [one.records[stage] for one in found])))
    auditor = Auditor(model.store, model.manifest, AUDITOR, calibrations, Signer.fresh())
    audited_s, nobody = 0.0, Signer.fresh().public
    for i, one in enumerate([*found[:stages], *found]):  # the first ones warm up
        stage, began = i % stages, time.process_time()
        auditor.audit(one.statements[stage], one.records[stage], nobody, 0)
        audited_s += (time.process_time() - began) * (i >= stages)
    rows = sum(one.receipt.statements[0].n_rows for one in found)
    return {
        "audit_of_one_stage_of_every_answer_share_of_serving_percent": round(100 * audited_s / served_s, 1),
        "served_cpu_ms_a_row": round(1e3 * served_s / rows, 2),
        "audited_cpu_ms_a_row": round(1e3 * audited_s / rows, 2),
        "audited_rows_an_answer": round(rows / n, 1),
    }


def witnesses_s(pipeline: LocalPipeline) -> float:
    """Processor seconds of its witnesses so far."""
    return sum(stage.witness.cpu_s for stage in pipeline.stages)  # type: ignore[attr-defined]


async def check_times(model: PublishedModel, repeats: int = 30) -> dict[str, Any]:
    """Milliseconds of the client's whole check, by how many rows the receipt speaks of."""
    pipeline = model.pipeline(2, LocalLimits(n_pages=256))
    draw, out = random.Random(1), {}
    for prompt, tokens in CHECKED:
        request = greedy(model.manifest, random_prompt(draw, model.manifest, prompt), tokens)
        _, receipt = await ended(pipeline, request)
        times = []
        for _ in range(repeats):
            rows._remembered_root.cache_clear()  # a client that checks has not issued it
            began = time.perf_counter()
            checked = check(receipt, pipeline.operator.public, now_s=int(time.time()))
            times.append((time.perf_counter() - began) * 1e3)
        out[f"{checked.statements[0].n_rows}_rows"] = percentiles(times, 2)
    pipeline.close()
    return out


async def ended(pipeline: LocalPipeline, request: GenerationRequest) -> tuple[list[int], bytes]:
    """Its tokens and its receipt."""
    tokens: list[int] = []
    async for event in pipeline.generate(request):
        if isinstance(event, TokensEvent):
            tokens += event.tokens
        elif isinstance(event, FailedEvent):
            raise SystemExit(f"a request failed: {event.message}")
        else:
            receipt = event.receipt
    return tokens, receipt


@contextmanager
def _parts(witness: type, head: type) -> Iterator[None]:
    """A LocalPipeline built inside is built of these."""
    stage_module, local_module = serve_app.pipeline.stage, serve_app.local
    stage_module.Witness, local_module.Head = witness, head  # type: ignore[misc]
    try:
        yield
    finally:
        stage_module.Witness, local_module.Head = Witness, Head  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
