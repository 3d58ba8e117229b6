"""How many tokens does it take to see that a sampler does not draw as it was asked, and is an honest one accused?

    python -m benchmarks.redraw_detection [--requests 24] [--tokens 32] [--stages 2] [--dtype bfloat16]

A real pipeline answers `--requests` prompts for the band and as many others for the test, seeded, at temperature 1. The
head is computed again in float32 from the rows that the last stage signed for. So few draws part that the band is made
of more than the answers: of what a plain head in the dtype of the stages draws from the same rows, as three requests
ask for it. A cheat draws at every position of the honest test answers from that head: what it would have said there.
`tokens_needed` is counted from the first token of each test answer, on through those behind it, and around; so the runs
of the seldom bugs share tokens, and their spread is not that of independent ones. False alarms are of single answers;
the honest cases look at the same rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.audit_detection import source_text
from benchmarks.detection import clopper_pearson
from benchmarks.report import Result, save
from serve_app.api.text import TextCodec
from serve_app.audit.band import DrawBand, calibrate_draws, judge_draws
from serve_app.audit.error import Floats, floats_of
from serve_app.audit.margin import margin
from serve_app.audit.redraw import Redrawer
from serve_app.demo import demo_model
from serve_app.engine.dishonest_sampler import DISHONEST_SAMPLERS
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, load_head
from serve_app.engine.output_head import OutputHead
from serve_app.engine.sampler import Draw
from serve_app.messages.request import MICRO, Sampling
from serve_app.receipts.commitment import noise_key
from serve_app.rehearsal import Rehearsed, prompts_of, rehearse
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.fetch import read_file
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore

PLAIN = Sampling()
NUCLEUS = Sampling(7 * MICRO // 10, top_p_micro=9 * MICRO // 10)
# What was asked for, and what was done: None for the same.
Cases = dict[str, tuple[Sampling, str | None]]
HONEST: Cases = {
    "honest, temperature 0": (Sampling(0), None),
    "honest, temperature 0.7, top-p 0.9": (NUCLEUS, None),
    "honest, temperature 1, plain torch": (PLAIN, None),
}
CHEATS: Cases = {name: (NUCLEUS if "top-p" in name else PLAIN, name) for name in DISHONEST_SAMPLERS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24, help="of the band, and as many of the test")
    parser.add_argument("--tokens", type=int, default=32, help="answered to each")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the stages")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    dtype, threads, began = cast(ActivationDtype, a.dtype), os.cpu_count() or 1, time.perf_counter()
    prover = LoadOptions(a.device, dtype, 16, max(1, threads // a.stages))
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        manifest = split(open_checkpoint(demo_model()), store, "smollm2-135m-instruct", "bfloat16")
        codec = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
        prompts = prompts_of(codec, source_text(2 * a.requests), 2 * a.requests)
        both = rehearse(store, manifest, prompts, stages=a.stages, options=prover, tokens=a.tokens, at_once=16)
        calibration, test = both[: a.requests], both[a.requests :]
        print(f"answered after {time.perf_counter() - began:.0f} s", flush=True)
        heads = [
            load_head(store, manifest, LoadOptions(a.device, d, 16, threads, engine=TORCH))
            for d in (cast(ActivationDtype, "float32"), dtype)
        ]
    redrawer = Redrawer(manifest, lambda: heads[0], (), Signer.fresh())
    margins = [[redrawer.margins(r.receipt, r.records[-1]) for r in part] for part in (calibration, test)]
    profile = test[0].receipt.statements[-1].profile
    width = manifest.hidden_size
    more = drawn(HONEST, calibration, heads[0], heads[1], dtype, width)
    band = calibrate_draws(manifest.cid, profile, heads[0].profile, [*margins[0], *(m for case in more for m in case)])
    cases = {"honest, the pipeline": found_in(margins[1], band)}
    print(f"{cases} after {time.perf_counter() - began:.0f} s", flush=True)
    played = HONEST | CHEATS
    for name, each in zip(played, drawn(played, test, heads[0], heads[1], dtype, width), strict=True):
        cases[name] = found_in(each, band)
        print(f"{name}: {cases[name]}", flush=True)
    honest = [case for name, case in cases.items() if name.startswith("honest")]
    alarms, of = sum(case["answers_accused"] for case in honest), sum(case["answers"] for case in honest)
    figures = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": dtype,
        "profile": profile,
        "band_draws": band.draws,
        "band_differing": band.beyond,
        "band_largest_logits": round(band.largest_pico / 1e12, 4),
        "limit_of_one_answer_logits": round(band.limit(a.tokens), 4),
        "false_alarms_and_interval": [alarms, of, *(round(x, 5) for x in clopper_pearson(alarms, of))],
        "cases": cases,
        "seconds": round(time.perf_counter() - began),
    }
    save(Result("redraw_detection", figures), a.out)
    return 0


def drawn(
    cases: Cases,
    answers: list[Rehearsed],
    auditor: OutputHead,
    prover: OutputHead,
    dtype: ActivationDtype,
    width: int,
) -> list[list[Floats]]:
    """Of each case, the margins of what would have been said at each position of each answer."""
    out: list[list[Floats]] = [[] for _ in cases]
    for one in answers:
        receipt, opening = one.receipt.receipt, one.receipt.opening
        rows = floats_of(one.records[-1].sent, dtype, width)[receipt.n_prompt - 1 :]
        pairs = list(zip(prover.logits(rows), auditor.logits(rows), strict=True))
        key = noise_key(receipt.sampling, opening.client_nonce, receipt.node_nonce)
        known: dict[tuple[Draw, int, int], float] = {}
        for at, (asked, cheat) in enumerate(cases.values()):
            draw = Draw(asked.temperature_micro, asked.top_k, asked.top_p_micro, key)
            by = draw if cheat is None else DISHONEST_SAMPLERS[cheat](replace(draw))
            found = []
            for position, (said, true) in enumerate(pairs, receipt.n_prompt):
                token = by.token(said, position)
                if (draw, position, token) not in known:
                    known[draw, position, token] = margin(draw, true, position, token)
                found.append(known[draw, position, token])
            out[at].append(np.array(found))
    return out


def found_in(margins: list[Floats], band: DrawBand) -> dict[str, Any]:
    """What single answers show, and how many tokens from each answer on were enough."""
    single = [judge_draws(m, band) for m in margins]
    needed = []
    for i in range(len(margins)):
        at = judge_draws(np.concatenate(margins[i:] + margins[:i]), band).found_at
        if at is not None:
            needed.append(at)
    every = np.concatenate(margins)
    low, high = clopper_pearson(len(needed), len(margins))
    return {
        "answers": len(margins),
        "answers_accused": sum(j.finding == "sampler" for j in single),
        "tokens": len(every),
        "differing_percent": round(100 * sum(j.differing for j in single) / len(every), 2),
        "largest_margin": round(float(every.max()), 4),
        "runs_that_found_it": [len(needed), round(low, 4), round(high, 4)],
        "tokens_needed_median_p90_max": [int(np.quantile(needed, q)) for q in (0.5, 0.9, 1.0)] if needed else None,
    }


if __name__ == "__main__":
    sys.exit(main())
