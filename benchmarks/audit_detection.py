"""Which cheats does an audit see, from how many tokens, and how often does it accuse an honest stage?

    python -m benchmarks.audit_detection [--requests 48] [--stages 3] [--dtype bfloat16] [--device cpu] [--attacks ...]

A real pipeline answers `--requests` prompts for the calibration and as many others for the test, prefill and decode in
the batches of its scheduler. Each stage of each is replayed in float32. A cheat is the stage's own recorded input,
computed again by an engine that cheats, in the dtype of the stages. One window of n rows a request, the last ones; the
limit is the larger of the fitted tail at 1e-6 and 1.25 x the largest honest window of the calibration, as verdict.py
has it for one window (it looks at all of a request, and divides 1e-6 among them). Prompts are windows of Python's own
source, one after another, none over another.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.report import Result, save
from serve_app.api.text import TextCodec
from serve_app.audit.auditor import Auditor
from serve_app.audit.error import Floats, Rows, channel_sizes, eased, floats_of, whitened_errors, window_means
from serve_app.audit.replay import REPLAY_PAGE, Replayed, through_layer
from serve_app.audit.tail import MIN_SAMPLES, fit
from serve_app.audit.verdict import FAULT_P, GUARD
from serve_app.demo import demo_model
from serve_app.engine.dishonest import DISHONEST, spoil
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, load_layers
from serve_app.rehearsal import PROMPT_TOKENS, prompts_of, rehearse
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.fetch import read_file
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore

TOKENS = (1, 2, 4, 8, 16, 32)
CONFIDENCE = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48, help="of the calibration, and as many of the test")
    parser.add_argument("--tokens", type=int, default=32, help="answered to each")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--at", type=int, nargs="+", default=None, help="stages to judge; default: all")
    parser.add_argument("--at-once", type=int, default=8, help="requests side by side in the calibration")
    parser.add_argument("--test-at-once", type=int, default=16, help="and in the test")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the stages")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--attacks", nargs="+", choices=sorted(DISHONEST), default=list(DISHONEST))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    dtype = cast(ActivationDtype, a.dtype)
    threads = os.cpu_count() or 1
    prover = LoadOptions(a.device, dtype, 16, max(1, threads // a.stages))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        manifest = split(open_checkpoint(demo_model()), store, "smollm2-135m-instruct", "bfloat16")
        codec = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
        prompts = prompts_of(codec, source_text(2 * a.requests), 2 * a.requests)
        found = [
            rehearse(store, manifest, part, stages=a.stages, options=prover, tokens=a.tokens, at_once=at_once)
            for part, at_once in ((prompts[: a.requests], a.at_once), (prompts[a.requests :], a.test_at_once))
        ]
        print(f"answered after {time.perf_counter() - began:.0f} s", flush=True)
        figures: dict[str, Any] = {
            "model": "SmolLM2-135M-Instruct",
            "dtype": dtype,
            "calibration_requests": a.requests,
            "test_requests": a.requests,
            "at_once": [a.at_once, a.test_at_once],
            "profile": found[0][0].receipt.statements[0].profile,
        }
        single = LoadOptions(a.device, "float32", 16, threads, engine=TORCH)
        auditor = Auditor(store, manifest, single, (), Signer.fresh())
        cases: dict[str, dict[str, Any]] = {}
        for stage in a.at or range(a.stages):
            said = [[r.receipt.statements[stage] for r in part] for part in found]
            records = [[r.records[stage] for r in part] for part in found]
            (sent, replays), (sent_test, replays_test) = (
                auditor.compare(s, r) for s, r in zip(said, records, strict=True)
            )
            sizes = channel_sizes([r.rows for r in replays])
            usual = float(np.median(np.concatenate([moved(r, sizes) for r in replays])))
            limits = limits_of(errors_of(sent, replays, sizes, usual))
            figures[f"limits_stage_{stage}"] = {str(n): float(f"{limit:.3g}") for n, limit in limits.items()}
            span = said[0][0].start, said[0][0].stop

            def again(attack: str | None) -> list[Rows]:
                engine = load_layers(
                    store, manifest, *span, LoadOptions(a.device, dtype, REPLAY_PAGE, threads, engine=TORCH)
                )
                if attack is not None:
                    spoil(engine, attack)
                sent = through_layer(engine, span[0], [r.received for r in records[1]])
                return [floats_of(rows, dtype, manifest.hidden_size) for rows in sent]

            sources: dict[str, Callable[[], list[Rows]]] = {
                "honest: the pipeline": lambda: sent_test,
                "honest: one prefill by plain torch": lambda: again(None),
            }
            sources |= {attack: (lambda attack=attack: again(attack)) for attack in a.attacks}
            for name, rows_of in sources.items():
                errors = errors_of(rows_of(), replays_test, sizes, usual)
                cases.setdefault(name, {})[f"stage_{stage}"] = counted(errors, limits)
                print(f"stage {stage}, {name}: {cases[name][f'stage_{stage}']}", flush=True)
    figures["cases"] = {name: with_total(case) for name, case in cases.items()}
    figures["seconds"] = round(time.perf_counter() - began)
    save(Result("audit_detection", figures), a.out)
    return 0


def source_text(prompts: int) -> str:
    """Enough of Python's own source for so many prompts: English and code, the same for one version of Python."""
    wanted, parts, size = prompts * PROMPT_TOKENS * 6, [], 0  # characters: a token has two and more
    for path in sorted(Path(os.__file__).parent.glob("**/*.py")):
        if "site-packages" not in path.parts and size < wanted:
            parts.append(path.read_text(errors="ignore"))
            size += len(parts[-1])
    return "\n".join(parts)


def moved(replayed: Replayed, sizes: Floats) -> Floats:
    """[rows]: how far the last bit of what went in moves each."""
    assert replayed.nudged is not None, "SmolLM2's stages have ten layers and more"
    return whitened_errors(replayed.nudged, replayed.rows, sizes)


def errors_of(sent: list[Rows], replays: list[Replayed], sizes: Floats, usual: float) -> list[Floats]:
    """As Calibration.errors, of every record."""
    return [
        eased(whitened_errors(y, r.rows, sizes), moved(r, sizes), usual) for y, r in zip(sent, replays, strict=True)
    ]


def limits_of(errors: list[Floats]) -> dict[int, float]:
    """By window length, where there are enough windows."""
    out = {}
    for n in TOKENS:
        means = np.concatenate([window_means(e, n) for e in errors])
        if len(means) >= MIN_SAMPLES:
            tail = fit(n, means)
            out[n] = max(tail.limit(FAULT_P), GUARD * tail.largest)
    return out


def counted(errors: list[Floats], limits: dict[int, float]) -> dict[str, Any]:
    """How many requests are past the limit, by window length, and how large errors are."""
    past = {str(n): sum(float(e[-n:].mean()) > limit for e in errors) for n, limit in limits.items()}
    every = np.concatenate(errors)
    return {
        "past_limit": past,
        "of": len(errors),
        "median_error": float(f"{np.median(every):.3g}"),
        "largest_error": float(f"{every.max():.3g}"),
    }


def with_total(case: dict[str, Any]) -> dict[str, Any]:
    """With the share over all stages, and its interval."""
    of, shares = sum(stage["of"] for stage in case.values()), {}
    for n in set.intersection(*(set(stage["past_limit"]) for stage in case.values())):
        past = sum(stage["past_limit"][n] for stage in case.values())
        low, high = clopper_pearson(past, of)
        shares[n] = [round(past / of, 5), round(low, 5), round(high, 5)]
    return case | {"share_and_interval": dict(sorted(shares.items(), key=lambda item: int(item[0])))}


def clopper_pearson(found: int, of: int) -> tuple[float, float]:
    """The exact interval of a share, at CONFIDENCE. Source: Clopper and Pearson 1934."""

    def at_most(p: float, k: int) -> float:
        logs = [
            math.lgamma(of + 1)
            - math.lgamma(i + 1)
            - math.lgamma(of - i + 1)
            + i * math.log(p)
            + (of - i) * math.log1p(-p)
            for i in range(k + 1)
        ]
        return math.fsum(map(math.exp, logs))

    def where(holds: Callable[[float], bool]) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    rest = (1 - CONFIDENCE) / 2
    lower = 0.0 if found == 0 else where(lambda p: 1 - at_most(p, found - 1) < rest)
    upper = 1.0 if found == of else where(lambda p: at_most(p, found) > rest)
    return lower, upper


if __name__ == "__main__":
    sys.exit(main())
