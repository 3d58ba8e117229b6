"""Has a row the same bits however it was computed, where `pipeline.deterministic` is on, and what does that cost?

    python -m benchmarks.exact_windows [--model smollm2] [--dtype float32] [--sequences 64] [--rows 256]
    python -m benchmarks.exact_windows --save FILE        here, then on another machine --compare FILE

Sequences of ordinary tokens, whose rows are cut into windows of 16, each named by the SHA-256 of its bytes: hidden rows
that leave the last layer, and their logits. The first run is what an auditor does: whole sequences, one after another,
layer by layer, each in an engine of its own, then the head. Every other run is a process of its own, which computes the
whole model with up to `batch` sequences side by side, drawn at random for each step together with how many rows each
goes on by (often one): so batch, cut, place in the engine's windows, pages and process differ. It fails if a window
differs. Another number of threads is another profile: how many windows differ then is told, and fails nothing.
Price: the same greedy requests through pipelines of one stage, in turn: deterministic, plain torch ops, the fastest;
and rows replayed per second, in windows and in one pass.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from benchmarks.models import PAGE_SIZE, PublishedModel, greedy, published, random_prompt
from benchmarks.report import Result, machine, save
from serve_app.audit.error import floats_of
from serve_app.audit.exact import computed
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.engines import AUTO, TORCH
from serve_app.engine.load import LoadOptions, load_head, load_plain
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FinishedEvent
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
from shard_tools.cid import Cid
from shard_tools.fetch import load_manifest
from shard_tools.manifest import Manifest
from shard_tools.store.directory import DirectoryStore

WINDOW = 16  # rows
COUNTS = (1, 1, 1, 2, 5, 16, 37)  # rows by which a sequence goes on: decode, guesses, pieces of a prompt
Ids = list[npt.NDArray[np.uint32]]


@dataclass(frozen=True, slots=True)
class Run:
    """One process. batch 0: the auditor's way."""

    store: str
    manifest: str
    dtype: ActivationDtype
    threads: int
    sequences: int
    rows: int
    batch: int
    seed: int

    @property
    def options(self) -> LoadOptions:
        """Of its engine."""
        return LoadOptions("cpu", self.dtype, PAGE_SIZE, self.threads, engine=TORCH, deterministic=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256, help="of each sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3, 8, 17, 64])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--other-threads", type=int, nargs="*", default=[1])
    parser.add_argument("--pairs", type=int, default=3, help="of the price; 0: none")
    parser.add_argument("--save", type=Path, default=None, help="the first run's hashes, for another machine")
    parser.add_argument("--compare", type=Path, default=None, help="hashes that another machine has saved")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)  # of a child: a Run in JSON
    a = parser.parse_args()
    if a.run is not None:
        print(json.dumps(in_this_process(Run(**json.loads(a.run)))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder) / "model", a.model)
        first = Run(
            str(model.root / "store"),
            str(model.manifest.cid),
            cast(ActivationDtype, a.dtype),
            a.threads,
            a.sequences,
            a.rows,
            0,
            0,
        )
        figures: dict[str, Any] = {"model": model.manifest.name, "dtype": a.dtype, "threads": a.threads}
        figures |= equal_windows(first, a.batches, a.other_threads, a.save, a.compare)
        if a.pairs:
            figures |= asyncio.run(price(model, first, a.pairs))
    save(Result("exact_windows", figures), a.out)
    return int(figures["windows_unequal"] > 0 or figures.get("windows_unequal_to_other_machine", 0) > 0)


def equal_windows(
    first: Run, batches: list[int], other_threads: list[int], keep: Path | None, other: Path | None
) -> dict[str, Any]:
    """Every run against the auditor's."""
    found = apart(first)
    names: list[str] = found["windows"]
    figures: dict[str, Any] = {
        "profile": found["profile"],
        "windows": len(names),
        "replayed_rows_per_s": round(first.sequences * first.rows / found["seconds"]),
        "runs": {},
    }
    unequal: set[int] = set()
    for seed, batch in enumerate(batches, 1):
        run = apart(replace(first, batch=batch, seed=seed))
        differing = {i for i, (x, y) in enumerate(zip(names, run["windows"], strict=True)) if x != y}
        assert run["profile"] == found["profile"], run["profile"]
        unequal |= differing
        figures["runs"][f"batch {batch}"] = {
            "unequal": len(differing),
            "rows_a_step_mean": run["rows_a_step"],
            "spans_of_one_row": run["single"],
            "seconds": round(run["seconds"]),
        }
        print(f"batch {batch}: {figures['runs'][f'batch {batch}']}", flush=True)
    figures["windows_unequal"] = len(unequal)
    for threads in other_threads:
        if threads != first.threads:
            run = apart(replace(first, threads=threads, batch=8, seed=99))
            figures[f"windows_unequal_with_{threads}_threads_for_information"] = sum(
                x != y for x, y in zip(names, run["windows"], strict=True)
            )
    if keep is not None:
        keep.write_text(json.dumps({"machine": machine(), "profile": found["profile"], "windows": names}))
    if other is not None:
        theirs = json.loads(other.read_text())
        figures["other_machine"], figures["other_profile"] = theirs["machine"], theirs["profile"]
        figures["windows_unequal_to_other_machine"] = sum(x != y for x, y in zip(names, theirs["windows"], strict=True))
    return figures


def apart(run: Run) -> dict[str, Any]:
    """The run in a process of its own, whose OpenMP is told another number of threads than it is to use."""
    command = [sys.executable, "-m", "benchmarks.exact_windows", "--run", json.dumps(asdict(run))]
    env = {**os.environ, "OMP_NUM_THREADS": str(1 + run.seed % 2), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a run ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_this_process(run: Run) -> dict[str, Any]:
    """The names of all windows, sequence by sequence, and what was done for them."""
    store = DirectoryStore(Path(run.store))
    manifest = load_manifest(store, Cid.parse(run.manifest))
    draw = random.Random(7)
    ids = [np.array(random_prompt(draw, manifest, run.rows), "<u4") for _ in range(run.sequences)]
    began = time.perf_counter()
    if run.batch == 0:
        received = [one.tobytes() for one in ids]
        hidden, profile = computed(store, manifest, (0, manifest.n_layers), received, run.options)
        seconds = time.perf_counter() - began
        head = load_head(store, manifest, run.options)
        logits = [
            np.stack(list(head.logits(floats_of(rows, run.dtype, manifest.hidden_size)))).tobytes() for rows in hidden
        ]
        counts: dict[str, Any] = {}
    else:
        hidden, logits, profile, counts = mixed(run, store, manifest, ids)
        seconds = time.perf_counter() - began
    names = [name for h, s in zip(hidden, logits, strict=True) for name in windows_of(h, s, run.rows)]
    return {"windows": names, "profile": profile, "seconds": seconds, **counts}


def mixed(
    run: Run, store: DirectoryStore, manifest: Manifest, ids: Ids
) -> tuple[list[bytes], list[bytes], str, dict[str, Any]]:
    """Hidden rows and logits of each sequence, computed in random company."""
    engine, rng = load_plain(store, manifest, 0, manifest.n_layers, run.options), np.random.default_rng(run.seed)
    n_pages = run.sequences * -(-run.rows // PAGE_SIZE)
    engine.reserve(n_pages, run.sequences)
    pages = iter(rng.permutation(n_pages).tolist())
    done, held = [0] * len(ids), [0] * len(ids)
    hidden, logits = [bytearray() for _ in ids], [bytearray() for _ in ids]
    steps = single = 0
    waiting, running = rng.permutation(len(ids)).tolist(), list[int]()
    while waiting or running:
        while waiting and len(running) < run.batch:
            running.append(waiting.pop())
        company = rng.permutation(running)[: rng.integers(1, len(running) + 1)].tolist()
        opens, spans, new, rows, closes = [], [], list[int](), [], []
        for seq in company:
            count = min(run.rows - done[seq], int(rng.choice(COUNTS)))
            need = -(-(done[seq] + count) // PAGE_SIZE) - held[seq]
            opens += [seq] * (done[seq] == 0)
            spans.append((seq, done[seq], count, need, 0))
            new += [next(pages) for _ in range(need)]
            rows.append(ids[seq][done[seq] : done[seq] + count])
            done[seq], held[seq], single = done[seq] + count, held[seq] + need, single + (count == 1)
            if done[seq] == run.rows:
                closes.append((seq, 0, 0))
                running.remove(seq)
        opening = np.zeros(len(opens), OPEN)
        opening["seq"] = opens
        plan = StepPlan(
            1,
            steps,
            opening,
            np.array(spans, SPAN),
            np.array(new, "<u4"),
            np.array(closes, CLOSE),
            np.zeros(0, "<u8"),
        )
        out = engine.run(plan, np.concatenate(rows).view(np.uint8).data).hidden
        scores, width, at = engine.logits_of(out).numpy(), len(out) // plan.rows, 0
        for seq, _, count, _, _ in spans:
            hidden[seq] += out[at * width : (at + count) * width]
            logits[seq] += scores[at : at + count].tobytes()
            at += count
        steps += 1
    counts = {"rows_a_step": round(run.sequences * run.rows / steps, 1), "single": single}
    return [bytes(h) for h in hidden], [bytes(s) for s in logits], engine.profile.description, counts


def windows_of(hidden: bytes, logits: bytes, rows: int) -> list[str]:
    """The name of each whole window of one sequence."""
    h, s = np.frombuffer(hidden, np.uint8).reshape(rows, -1), np.frombuffer(logits, np.uint8).reshape(rows, -1)
    return [
        hashlib.sha256(h[i : i + WINDOW].tobytes() + s[i : i + WINDOW].tobytes()).hexdigest()[:32]
        for i in range(0, rows - WINDOW + 1, WINDOW)
    ]


async def price(model: PublishedModel, run: Run, pairs: int) -> dict[str, Any]:
    """Tokens/s of each kind of engine, one request alone and eight side by side; and of replays."""
    kinds = {
        "deterministic": run.options,
        "torch": replace(run.options, deterministic=False),
        "fastest": replace(run.options, deterministic=False, engine=AUTO),
    }
    limits = LocalLimits(n_pages=128, max_running=8)
    pipelines = {
        name: LocalPipeline(model.store, model.manifest, stages=1, options=options, limits=limits)
        for name, options in kinds.items()
    }
    draw = random.Random(1)
    prompts = [random_prompt(draw, model.manifest, 32) for _ in range(8)]
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 8: []} for name in kinds}
    for i in range(pairs + 1):
        for name, pipeline in sorted(pipelines.items(), reverse=bool(i % 2)):
            for at_once in (1, 8):
                rate = await decode_rate(pipeline, model.manifest, prompts[:at_once])
                if i:  # the first pair warms up
                    rates[name][at_once].append(rate)
    for pipeline in pipelines.values():
        pipeline.close()
    received = [np.array(random_prompt(draw, model.manifest, 256), "<u4").tobytes() for _ in range(2)]
    replays = {}
    for name in ("deterministic", "torch"):
        began = time.perf_counter()
        computed(model.store, model.manifest, (0, model.manifest.n_layers), received, kinds[name])
        replays[name] = round(512 / (time.perf_counter() - began), 1)
    return {
        "tokens_per_s": {
            name: {f"{n} at once": round(statistics.median(seen), 2) for n, seen in by.items()}
            for name, by in rates.items()
        },
        "replay_rows_per_s": replays,
    }


async def decode_rate(pipeline: LocalPipeline, manifest: Manifest, prompts: list[tuple[int, ...]]) -> float:
    """Answer tokens per second, of 24 each."""

    async def ask(prompt: tuple[int, ...]) -> None:
        (*_, last) = [event async for event in pipeline.generate(greedy(manifest, prompt, 24))]
        assert isinstance(last, FinishedEvent), last

    began = time.perf_counter()
    await asyncio.gather(*map(ask, prompts))
    return 24 * len(prompts) / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
