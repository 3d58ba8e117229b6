"""Stages on GPUs: offline throughput and decode latency by batch size, through the real pipeline, receipts on.

    python3 -m benchmarks.gpu_serving --model qwen3-0.6b --work nano decode
    python3 -m benchmarks.gpu_serving --model llama3-8b --work decode
    python3 -m benchmarks.gpu_serving --model llama3-8b --work decode --stages 2 --batches 512
    python3 -m benchmarks.gpu_serving --model llama3-8b --work decode --quantise int4 --kv fp8

Random weights of the exact published configuration are written as a checkpoint, published into a block store, loaded by
CID and served: Head, scheduler, stages, witnesses, signed receipts; each stage in a process and on a GPU of its own,
behind the edges that the application has (with --threads all in one process, as LocalPipeline). "nano" is nano-vllm's
workload: 256 requests, prompt and answer lengths U(100, 1024), seed 0, temperature 0.6. "decode" takes 128-token
prompts and divides the time between answers of 2 and of 130 tokens by 128. Every run fails unless each request got its
receipt and the rows hashed are those that were fed. The floor is what must be read per step over the memory's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_models import MODELS, bytes_read, kv_bytes, write_checkpoint
from benchmarks.report import Result, save
from benchmarks.stage_processes import Counters, ProcessPipeline
from serve_app.engine.engine import ActivationDtype, DeviceName, KvDtype
from serve_app.engine.engines import AUTO, TORCH
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
from serve_app.receipts.check import check
from shard_tools.fetch import load_manifest
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore

MEMORY_GB_S = {"H100": 3350, "H200": 4800}  # nominal
Asked = tuple[list[int], int]  # prompt, tokens to generate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-0.6b")
    parser.add_argument("--work", nargs="+", choices=["nano", "decode", "logits"], default=["nano", "decode"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--folder", type=Path, default=None, help="for the weights; default: a temporary one")
    parser.add_argument("--step-tokens", type=int, default=16_384)
    parser.add_argument("--stages", type=int, nargs="+", default=[1], help="pipelines to measure, one after another")
    parser.add_argument("--through-host", action="store_true", help="rows go from GPU to GPU through the host")
    parser.add_argument("--threads", action="store_true", help="one process; --profile needs it")
    parser.add_argument("--switch-interval", type=float, default=1e-5, help="seconds a thread may keep others waiting")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--per-gpu", action="store_true", help="--batches are for each stage")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="decode steps of these batches, by kernel")
    parser.add_argument("--layers", type=int, default=None, help="of the model, fewer than published: to see kernels")
    parser.add_argument(
        "--quantise", choices=["none", "int8", "int4", "fp8"], default="none", help="the published weights"
    )
    parser.add_argument("--kv", choices=["auto", "fp8"], default="auto", help="what pages of keys and values hold")
    parser.add_argument("--trace", action="store_true", help="the last steps by kind")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    a.threads |= bool(a.profile)
    if a.layers is not None:
        MODELS[a.model]["num_hidden_layers"] = a.layers
    sys.setswitchinterval(a.switch_interval)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        published = prepare(a, Path(folder))
        for stages in a.stages:
            figures = asyncio.run(measure(a, Path(folder), published, stages))
            model = {"model": a.model, "layers": MODELS[a.model]["num_hidden_layers"], "stages": stages}
            model |= {"quantise": a.quantise, "kv": a.kv}
            save(Result("gpu_serving", model | figures), a.out)
    return 0


@dataclass(frozen=True, slots=True)
class Published:
    """The model, in its store."""

    store: DirectoryStore
    manifest: Manifest
    figures: dict[str, Any]


def prepare(a: argparse.Namespace, root: Path) -> Published:
    """Write and publish."""
    began = time.perf_counter()
    write_checkpoint(root / "checkpoint", MODELS[a.model], a.device)
    if a.device == "cuda":
        torch.cuda.empty_cache()  # the stages are other processes
    written = time.perf_counter()
    store = DirectoryStore(root / "store")
    record = publish(
        root / "checkpoint",
        store,
        DirectoryIndex(root / "store"),
        a.model,
        Signer.fresh(),
        scheme=None if a.quantise == "none" else a.quantise,
    )
    figures = {"torch": torch.__version__, "write_s": written - began, "publish_s": time.perf_counter() - written}
    return Published(store, load_manifest(store, record.manifest), rounded(figures))


async def measure(a: argparse.Namespace, root: Path, model: Published, stages: int) -> dict[str, Any]:
    """Load, run."""
    figures, store, manifest = dict(model.figures), model.store, model.manifest
    batches = [batch * (stages if a.per_gpu else 1) for batch in a.batches]
    began = time.perf_counter()
    page, context = 16, int(MODELS[a.model]["max_position_embeddings"])
    options = LoadOptions(a.device, "bfloat16", page, None, kv_dtype=a.kv)
    limits = LocalLimits(
        n_pages=22_000 if not a.model.startswith("tiny") else 2_000,
        max_step_tokens=a.step_tokens,
        max_running=max(256, *batches) if not a.model.startswith("tiny") else 16,
        max_waiting=1024,
    )
    pipeline: Any
    if a.threads:
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)
        figures["load"] = rounded(getattr(pipeline.stages[0]._engine, "timings", {}))
        figures["engine"] = pipeline.stages[0]._engine.profile.description
    else:
        gpus = list(range(stages)) if a.device == "cuda" else None
        pipeline = ProcessPipeline(
            root / "store",
            manifest,
            stages=stages,
            options=options,
            limits=limits,
            gpus=gpus,
            switch_interval_s=a.switch_interval,
            lend=not a.through_host,
        )
        figures["load"], figures["engine"] = pipeline.timings, pipeline.description
        figures["past_host"] = pipeline.past_host
    loaded = time.perf_counter()
    await pipeline.warm_up()
    figures["load_s"] = round(loaded - began, 2)
    figures["first_token_s"] = round(time.perf_counter() - loaded, 2)
    print(figures, flush=True)
    course = Course(pipeline, manifest.vocab_size)
    if "nano" in a.work:
        asked = nano(manifest.vocab_size, 256 if not a.model.startswith("tiny") else 20)
        for attempt in range(2):
            seconds, _ = await course.run(asked)
            n = sum(tokens for _, tokens in asked)
            figures[f"nano_tokens_per_s_{attempt}"] = round(n / seconds)
            print(f"nano: {n} tokens in {seconds:.2f} s: {n / seconds:.0f} tok/s", flush=True)
            if a.trace:
                report(pipeline.counters())
    if "decode" in a.work:
        shape = MODELS[a.model]
        speed = next((s for name, s in MEMORY_GB_S.items() if name in device_name(a.device)), None)
        for batch in batches:
            times: dict[int, float] = {}
            for tokens in (2, 2, 130, 130):  # the first of a kind may find kernels to compile
                prompts = [random.choices(range(manifest.vocab_size - 300), k=128) for _ in range(batch)]
                seconds, _ = await course.run([(p, tokens) for p in prompts])
                times[tokens] = min(seconds, times.get(tokens, seconds))
            step = (times[130] - times[2]) / 128
            figures[f"decode_{batch}_ms"] = round(step * 1e3, 3)
            line = f"decode at batch {batch}: {step * 1e3:.3f} ms a step, {batch / step:.0f} tok/s"
            if speed:
                # Of all stages together, each of which reads its own layers once for every micro-batch.
                rows = batch // stages
                n_bytes = bytes_read(manifest, shape, rows) + rows * (128 + 65) * kv_bytes(shape, a.kv)
                floor = n_bytes / speed / 1e9
                figures[f"decode_{batch}_of_floor"] = round(step / floor, 3)
                line += f", {step / floor:.2f} x the bandwidth floor of {floor * 1e3:.2f} ms"
            if stages > 1 and not a.threads:
                hops = sorted(pipeline.hops_us())
                figures[f"decode_{batch}_hop_us"] = round(hops[len(hops) // 2])
                line += f"; a hop takes {hops[len(hops) // 2]:.0f} us, nine of ten {hops[len(hops) * 9 // 10]:.0f}"
            print(line, flush=True)
    figures["rows_hashed"], figures["rows_fed"] = course.check_rows()
    for batch in a.profile:
        await profile(course, batch)
    assert context >= 2048
    pipeline.close()
    if "logits" in a.work:
        figures |= logits(store, manifest, a.device, a.kv)
    return figures


def logits(store: DirectoryStore, manifest: Manifest, device: DeviceName, kv: KvDtype) -> dict[str, float]:
    """How far the fused engine's logits lie from a float32 reference, beside plain torch ops of the same dtype.

    A prompt of 200 ids, then 16 decode steps of given ids. Fails if the fused engine is worse than 1.5 times as far, or
    3 times with pages of 8-bit floats.
    """
    n_prompt, n_decode, page = 200, 16, 16
    given = torch.randint(0, manifest.vocab_size, (n_prompt + n_decode,), generator=torch.Generator().manual_seed(1))
    ids = given.numpy().astype("<u4")

    def run(dtype: ActivationDtype, fused: bool) -> torch.Tensor:
        options = LoadOptions(device, dtype, page, None, AUTO if fused else TORCH)
        if fused:
            options = replace(options, kv_dtype=kv)
        engine: Any = load_engine(store, manifest, 0, manifest.n_layers, options)
        engine.reserve(32, 2)
        hidden = []
        for start, count in [(0, n_prompt), *((n_prompt + i, 1) for i in range(n_decode))]:
            opens = np.zeros(int(start == 0), OPEN)
            opens["seq"], opens["top_p_micro"] = 1, 10**6
            held, needed = -(-start // page), -(-(start + count) // page)
            spans = np.array([(1, start, count, needed - held, 1)], SPAN)
            none = np.zeros(0, "<u8")
            plan = StepPlan(1, start, opens, spans, np.arange(held, needed, dtype="<u4"), np.zeros(0, CLOSE), none)
            out = engine.run(plan, ids[start : start + count].tobytes())
            hidden.append(engine.logits_of(out.hidden).float().cpu())
        return torch.cat(hidden)

    exact, plain, fused = run("float32", False), run("bfloat16", False), run("bfloat16", True)
    errors = {name: float((found - exact).abs().max()) for name, found in (("plain", plain), ("fused", fused))}
    print(f"largest logit {float(exact.abs().max()):.3f}; largest error of bfloat16 to float32: {errors}", flush=True)
    bound = 1.5 if kv == "auto" else 3.0
    assert errors["fused"] <= bound * errors["plain"], "the fused engine is less exact than plain torch ops"
    figures = {f"{name}_logit_error": round(error, 4) for name, error in errors.items()}
    return {"largest_logit": round(float(exact.abs().max()), 3), **figures}


class Course:
    """Runs requests through one pipeline and counts what came."""

    def __init__(self, pipeline: LocalPipeline | ProcessPipeline, vocab_size: int) -> None:
        self.pipeline, self.vocab_size = pipeline, vocab_size
        self.numbers = iter(range(1 << 40))
        self.fed = 2  # the warm-up's

    async def run(self, asked: list[Asked]) -> tuple[float, list[bytes]]:
        """Seconds from the first submission to the last token, and the receipts. All requests are sent at once."""
        done = asyncio.Event()
        left, last_token, receipts = len(asked), 0.0, []
        counts: dict[str, int] = {}

        def sink(event: Any) -> None:
            nonlocal left, last_token
            if isinstance(event, TokensEvent):
                counts[event.id] = counts.get(event.id, 0) + len(event.tokens)
                last_token = time.perf_counter()
            elif isinstance(event, FailedEvent):
                raise SystemExit(f"a request failed: {event.message}")
            elif isinstance(event, FinishedEvent):
                receipts.append(event.receipt)
                left -= 1
                if left == 0:
                    done.set()

        manifest = self.pipeline.manifest.cid
        wanted: dict[str, int] = {}
        began = time.perf_counter()
        for prompt, tokens in asked:
            id = RequestId(str(next(self.numbers)))
            wanted[id] = tokens
            sampling = Sampling(temperature_micro=600_000)
            request = GenerationRequest(id, manifest, tuple(prompt), tokens, sampling, (), b"", fresh_salt())
            self.pipeline.head.submit(request, sink)
            await asyncio.sleep(0)
        await done.wait()
        assert counts == wanted and len(receipts) == len(asked) and all(receipts), "an answer or a receipt is missing"
        checked = check(receipts[-1], self.pipeline.operator.public, now_s=int(time.time()))
        assert len(checked.receipt.out_ids) in wanted.values()
        self.fed += sum(len(prompt) + tokens - 1 for prompt, tokens in asked)
        return last_token - began, receipts

    def check_rows(self) -> tuple[int, int]:
        """Rows hashed and rows fed; fails unless they are equal."""
        if isinstance(self.pipeline, ProcessPipeline):
            hashed = {counters.rows_hashed for counters in self.pipeline.counters()}
        else:
            hashed = {stage.witness.rows_hashed for stage in self.pipeline.stages}
        assert hashed == {self.fed}, f"{hashed} rows were hashed of {self.fed}"
        return self.fed, self.fed


def nano(vocab_size: int, n: int) -> list[Asked]:
    """nano-vllm's workload, drawn as its benchmark draws it."""
    draw = random.Random(0)
    top = min(10_000, vocab_size - 1)
    prompts = [[draw.randint(0, top) for _ in range(draw.randint(100, 1024))] for _ in range(n)]
    return [(prompt, draw.randint(100, 1024)) for prompt in prompts]


async def profile(course: Course, batch: int) -> None:
    """Which kernels the decode steps of a batch spend their time in."""
    prompts = [random.choices(range(course.vocab_size - 300), k=16) for _ in range(batch)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        seconds, _ = await course.run([(p, 64) for p in prompts])
    print(f"batch {batch}, 64 tokens in {seconds * 1e3:.1f} ms; of that on the device:")
    rows = sorted(prof.key_averages(), key=lambda row: -row.device_time_total)[:16]
    for row in rows:
        print(f"{row.device_time_total / 64:.1f} us a step, {row.count / 64:.2f} calls: {row.key[:70]}", flush=True)


def report(stages: list[Counters]) -> None:
    """The last steps by kind: how many, from end to end, in launch, and those launched after the last had ended."""
    for stage, counters in enumerate(stages):
        kinds: dict[str, list[tuple[float, float, int]]] = {}
        for before, step in itertools.pairwise(counters.times.values()):
            kind = "prompts" if step.rows > step.spans else f"decode <= {-(-step.spans // 64) * 64}"
            took, launching = step.ended - before.ended, step.launched - step.began
            kinds.setdefault(kind, []).append((took, launching, int(step.launched > before.ended)))
        for kind, steps in sorted(kinds.items()):
            n, took, launching, late = len(steps), *(sum(s[k] for s in steps) for k in range(3))
            each = f"{took / n * 1e3:6.2f} ms each, launch {launching / n * 1e3:5.2f} ms"
            print(f"stage {stage}: {kind:14} {n:5} steps {took:7.3f} s, {each}, late {late}", flush=True)


def rounded(timings: dict[str, Any]) -> dict[str, Any]:
    """To hundredths of a second."""
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in timings.items()}


def device_name(device: str) -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
