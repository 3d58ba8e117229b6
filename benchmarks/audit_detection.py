"""Which cheats does an audit see, from how many tokens, and how often does it accuse an honest stage?

    python -m benchmarks.audit_detection [--calibration 48] [--requests 48] [--attacked 48] [--stages 3]
        [--dtype bfloat16] [--device cpu] [--attacks ...] [--at-once 8] [--test-at-once 16 ...] [--cpu-auditor 0]

A real pipeline answers prompts for the calibration and others for the test, prefill and decode in the batches of its
scheduler; of the test as many pipelines as `--test-at-once` names, each in its own process and with so many requests
side by side, answer a part each. Each stage of each answer is replayed in float32. A cheat is the stage's own recorded
input of the first `--attacked` test requests, computed again by an engine that cheats, in the dtype of the stages. One
window of n rows a request, the last ones; the limit is the larger of the fitted tail at 1e-6 and 1.25 x the largest
honest window of the calibration, as verdict.py has it for one window (it looks at all of a request, and divides 1e-6
among them). Prompts are windows of Python source, one after another, none over another. --cpu-auditor: so many of both
are replayed on the CPU as well, which is another profile and has limits of its own.
`toploc_refuses` is what TOPLOC's published rule says of the last 32 rows of the same boundaries.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.detection import counted, limits_of, told_apart, toploc_accepts, with_total
from benchmarks.report import Result, save
from serve_app.api.text import TextCodec
from serve_app.audit.auditor import Auditor
from serve_app.audit.error import Floats, Rows, channel_sizes, eased, floats_of, whitened_errors
from serve_app.audit.replay import REPLAY_PAGE, Replayed, through_layer
from serve_app.demo import demo_model
from serve_app.engine.dishonest import DISHONEST, spoil
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, load_layers
from serve_app.messages.record import StageRecord
from serve_app.receipts.statement import StageStatement
from serve_app.rehearsal import PROMPT_TOKENS, prompts_of, rehearse
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.cid import Cid
from shard_tools.fetch import load_manifest, read_file
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore

REPLAYED_AT_ONCE = 2000  # answers: their rows, replays and nudged replays are in memory together
_CHUNK = 10_000  # answers of one pipeline, whose rows are in memory until they end


@dataclass(frozen=True, slots=True)
class Job:
    """What one pipeline answers, and where its rows go."""

    store: Path
    manifest: Cid
    prompts: list[tuple[int, ...]]
    stages: int
    options: LoadOptions
    tokens: int
    at_once: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Answers:
    """Statements by answer and stage; the rows lie in files, by stage."""

    said: list[tuple[StageStatement, ...]]
    files: list[tuple[Path, Path]]

    def records(self, stage: int, first: int, count: int) -> list[StageRecord]:
        """Of answers [first, first + count), all of which have as many rows."""
        both = []
        for path in self.files[stage]:
            size = path.stat().st_size // len(self.said)
            with path.open("rb") as f:
                f.seek(first * size)
                both.append([f.read(size) for _ in range(min(count, len(self.said) - first))])
        return [StageRecord(*pair) for pair in zip(*both, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=48, help="honest requests that limits come from")
    parser.add_argument("--requests", type=int, default=48, help="honest requests of the test")
    parser.add_argument("--attacked", type=int, default=48, help="of those, how many a cheat computes")
    parser.add_argument("--tokens", type=int, default=32, help="answered to each")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--at", type=int, nargs="+", default=None, help="stages to judge; default: all")
    parser.add_argument("--at-once", type=int, default=8, help="requests side by side in the calibration")
    parser.add_argument("--test-at-once", type=int, nargs="+", default=[16], help="in each pipeline of the test")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the stages")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cpu-auditor", type=int, default=0, help="requests of both that a CPU replays too")
    parser.add_argument("--attacks", nargs="*", choices=sorted(DISHONEST), default=list(DISHONEST))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    threads = os.cpu_count() or 1
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = DirectoryStore(folder / "store")
        manifest = split(open_checkpoint(demo_model()), store, "smollm2-135m-instruct", "bfloat16")
        codec = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
        total = a.calibration + a.requests
        prompts = prompts_of(codec, source_text(total), total)
        parts = [prompts[: a.calibration], *split_up(prompts[a.calibration :], len(a.test_at_once))]
        at_once = [a.at_once, *a.test_at_once]
        workers = len(parts) if a.device == "cuda" else 1
        options = LoadOptions(a.device, cast(ActivationDtype, a.dtype), 16, max(1, threads // a.stages // workers))
        jobs = [
            Job(folder / "store", manifest.cid, part, a.stages, options, a.tokens, n, folder / f"part-{i}")
            for i, (part, n) in enumerate(zip(parts, at_once, strict=True))
        ]
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(answered, jobs))
        print(f"answered after {time.perf_counter() - began:.0f} s", flush=True)
        figures: dict[str, Any] = {
            "model": "SmolLM2-135M-Instruct",
            "dtype": a.dtype,
            "calibration_requests": a.calibration,
            "test_requests": a.requests,
            "attacked_requests": min(a.attacked, a.requests),
            "rows_a_request": found[0].said[0][0].n_rows,
            "at_once": at_once,
            "profile": found[0].said[0][0].profile,
            "answered_s": round(time.perf_counter() - began),
        }
        figures |= judged(store, manifest, options, found, a.at or range(a.stages), a.attacks, a.attacked, threads)
        if a.cpu_auditor:
            cpu = LoadOptions("cpu", options.dtype, 16, threads)
            few = [first_of(part, a.cpu_auditor) for part in (found[0], found[-1])]
            other = judged(store, manifest, cpu, few, a.at or range(a.stages), [], 0, threads)
            figures["auditor_on_the_cpu"] = other | {"requests_of_each": a.cpu_auditor}
    figures["seconds"] = round(time.perf_counter() - began)
    save(Result("audit_detection", figures), a.out)
    return 0


def judged(
    store: DirectoryStore,
    manifest: Any,
    options: LoadOptions,
    found: Sequence[Answers],
    stages: Sequence[int],
    attacks: Sequence[str],
    attacked: int,
    threads: int,
) -> dict[str, Any]:
    """Limits from the first of `found`, and what they say of the others, honest and not. options: of the stages, on the
    auditor's device."""
    dtype, figures = options.dtype, dict[str, Any]()
    cases: dict[str, dict[str, Any]] = {}
    apart: dict[str, dict[str, Any]] = {}
    auditor = Auditor(
        store, manifest, LoadOptions(options.device, "float32", 16, threads, engine=TORCH), (), Signer.fresh()
    )
    for stage in stages:
        measure = Measure.of(auditor, found[0], stage)
        limits = limits_of(measure.errors)
        figures[f"limits_stage_{stage}"] = {str(n): float(f"{limit:.3g}") for n, limit in limits.items()}
        span = found[0].said[0][stage].start, found[0].said[0][stage].stop

        def again(attack: str | None) -> Callable[[Sequence[StageRecord]], list[Rows]]:
            engine = load_layers(
                store, manifest, *span, LoadOptions(options.device, dtype, REPLAY_PAGE, threads, engine=TORCH)
            )
            if attack is not None:
                spoil(engine, attack)

            def sent(records: Sequence[StageRecord]) -> list[Rows]:
                out = through_layer(engine, span[0], [r.received for r in records])
                return [floats_of(rows, dtype, manifest.hidden_size) for rows in out]

            return sent

        sources = {"honest: one prefill by plain torch": again(None)} | {name: again(name) for name in attacks}
        errors: dict[str, list[Floats]] = {name: [] for name in ("honest: the pipeline", *sources)}
        refused = dict.fromkeys(errors, 0)
        left = attacked
        for sent, replays, records in measure.compared(auditor, found[1:], stage):
            shown = {"honest: the pipeline": sent}
            if left > 0:
                shown |= {name: source(records[:left]) for name, source in sources.items()}
                left -= len(records)
            for name, rows in shown.items():
                errors[name] += measure.of_rows(rows, replays[: len(rows)])
                refused[name] += sum(
                    not toploc_accepts(y, r.rows) for y, r in zip(rows, replays[: len(rows)], strict=True)
                )
        for name, own in errors.items():
            if own:
                case = counted(own, limits) | {"toploc_refuses": refused[name]}
                cases.setdefault(name, {})[f"stage_{stage}"] = case
                apart.setdefault(name, {})[f"stage_{stage}"] = told_apart(errors["honest: the pipeline"], own)
                print(f"stage {stage}, {name}: {case}", flush=True)
    figures["found_at_1e-4_and_partial_area"] = {k: v for k, v in apart.items() if not k.startswith("honest")}
    return figures | {"cases": {name: with_total(case) for name, case in cases.items()}}


@dataclass(frozen=True, slots=True)
class Measure:
    """How errors are measured at one stage, and those of the calibration."""

    sizes: Floats
    usual: float
    errors: list[Floats]

    @classmethod
    def of(cls, auditor: Auditor, answers: Answers, stage: int) -> Measure:
        """From honest answers."""
        sent: list[Rows] = []
        replays: list[Replayed] = []
        for own, replayed, _ in cls.compared(auditor, [answers], stage):
            sent += own
            replays += replayed
        sizes = channel_sizes([r.rows for r in replays])
        usual = float(np.median(np.concatenate([moved(r, sizes) for r in replays])))
        measure = cls(sizes, usual, [])
        measure.errors.extend(measure.of_rows(sent, replays))
        return measure

    @staticmethod
    def compared(
        auditor: Auditor, parts: Sequence[Answers], stage: int
    ) -> Iterator[tuple[list[Rows], list[Replayed], list[StageRecord]]]:
        """What was sent, what should have been, and the records, some answers at a time."""
        for part in parts:
            for first in range(0, len(part.said), REPLAYED_AT_ONCE):
                said = [s[stage] for s in part.said[first : first + REPLAYED_AT_ONCE]]
                records = part.records(stage, first, len(said))
                yield *auditor.compare(said, records), records

    def of_rows(self, sent: Sequence[Rows], replays: Sequence[Replayed]) -> list[Floats]:
        """As Calibration.errors, of every record."""
        return [
            eased(whitened_errors(y, r.rows, self.sizes), moved(r, self.sizes), self.usual)
            for y, r in zip(sent, replays, strict=True)
        ]


def answered(job: Job) -> Answers:
    """In a process of its own."""
    job.folder.mkdir()
    store = DirectoryStore(job.store)
    manifest = load_manifest(store, job.manifest)
    files = [(job.folder / f"received-{i}", job.folder / f"sent-{i}") for i in range(job.stages)]
    said: list[tuple[StageStatement, ...]] = []
    for first in range(0, len(job.prompts), _CHUNK):
        answers = rehearse(
            store,
            manifest,
            job.prompts[first : first + _CHUNK],
            stages=job.stages,
            options=job.options,
            tokens=job.tokens,
            at_once=job.at_once,
        )
        for stage, (received, sent) in enumerate(files):
            with received.open("ab") as f, sent.open("ab") as g:
                for one in answers:
                    f.write(one.records[stage].received)
                    g.write(one.records[stage].sent)
        said += [one.receipt.statements for one in answers]
        print(f"{len(said)} of {len(job.prompts)} answered, {job.at_once} at once", flush=True)
    return Answers(said, files)


def first_of(answers: Answers, n: int) -> Answers:
    """The first n of them; their files are cut."""
    n = min(n, len(answers.said))
    files = []
    for stage, pair in enumerate(answers.files):
        records = answers.records(stage, 0, n)
        cut = cast(tuple[Path, Path], tuple(path.with_name(f"{path.name}-cut") for path in pair))
        cut[0].write_bytes(b"".join(r.received for r in records))
        cut[1].write_bytes(b"".join(r.sent for r in records))
        files.append(cut)
    return Answers(answers.said[:n], files)


def split_up(prompts: list[tuple[int, ...]], n: int) -> list[list[tuple[int, ...]]]:
    """n parts of nearly one length."""
    bounds = [len(prompts) * i // n for i in range(n + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(bounds)]


def source_text(prompts: int) -> str:
    """Enough Python source for so many prompts: English and code, the same for one version of Python and packages."""
    wanted, parts, size = prompts * PROMPT_TOKENS * 6, [], 0  # characters: a token has two and more
    found = sorted(Path(os.__file__).parent.glob("**/*.py"), key=lambda path: ("-packages" in str(path), path))
    for path in found:
        if size >= wanted:
            break
        parts.append(path.read_text(errors="ignore"))
        size += len(parts[-1])
    return "\n".join(parts)


def moved(replayed: Replayed, sizes: Floats) -> Floats:
    """[rows]: how far the last bit of what went in moves each."""
    assert replayed.nudged is not None
    return whitened_errors(replayed.nudged, replayed.rows, sizes)


if __name__ == "__main__":
    sys.exit(main())
