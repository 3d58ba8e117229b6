"""A stage that cheats, caught in a terminal: calibrations, a receipt that verifies, verdicts about stages and tokens.

All in one process, with the demo's model: three stages that sign what they say, two auditors of two owners.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from serve_app.api.text import TextCodec
from serve_app.audit.auditor import Audited, Auditor
from serve_app.audit.band import DrawBand, calibrate_draws
from serve_app.audit.calibration import Calibration, calibrate
from serve_app.audit.error import Floats, Rows, floats_of
from serve_app.audit.margin import margin
from serve_app.audit.redraw import Redrawer, Redrawn
from serve_app.audit.standing import Standing, State, after_draws, after_verdict
from serve_app.audit.tail import PICO
from serve_app.demo import demo_model
from serve_app.engine.dishonest import DISHONEST
from serve_app.engine.dishonest_sampler import DISHONEST_SAMPLERS
from serve_app.engine.engine import ActivationDtype, DeviceName
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, computes_fast_in, load_head
from serve_app.engine.output_head import OutputHead
from serve_app.engine.sampler import Draw
from serve_app.messages.request import MICRO, Sampling
from serve_app.receipts.commitment import noise_key
from serve_app.rehearsal import Rehearsed, prompts_of, rehearse
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.choice import Choice
from shard_tools.errors import InputError
from shard_tools.fetch import read_file
from shard_tools.manifest import Manifest
from shard_tools.signing import Signer
from shard_tools.store.block_store import BlockStore
from shard_tools.store.directory import DirectoryStore

STAGES = 3
PAGE_SIZE = 16  # tokens, as in serve_app/config.yaml
_TOKENS = 40  # answered to each prompt of the calibration
# As clients ask. Greedy ones too: under noise two tokens that nearly tie seldom meet, and rounding does not show.
_SAMPLINGS = (Sampling(), Sampling(0), Sampling(7 * MICRO // 10, top_p_micro=9 * MICRO // 10))
_OWNERS = ("A", "B")
_MAX_TEXT_CHARS = 1 << 22

out = Console()


def choose_options(dtype: str, device: str, engine: str) -> LoadOptions:
    """How a stage or an auditor computes, said in words. Raises InputError."""
    if dtype not in get_args(ActivationDtype) or device not in get_args(DeviceName):
        raise InputError(f"{dtype!r} on {device!r} is not {get_args(ActivationDtype)} on {get_args(DeviceName)}")
    chosen = cast(ActivationDtype, dtype), cast(DeviceName, device)
    return LoadOptions(chosen[1], chosen[0], PAGE_SIZE, None, engine=Choice(engine))


def help_text() -> str:
    """Some hundred thousand words of English that come with Python: what `help()` says of its topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def calibrated(
    store: BlockStore,
    manifest: Manifest,
    text: str,
    stages: int,
    requests: int,
    tokens: int,
    at_once: int,
    prover: LoadOptions,
    auditor: LoadOptions,
) -> tuple[list[Calibration], DrawBand]:
    """A calibration of each stage and a band of draws, of honest requests whose prompts are the first of the text.

    Raises InputError for a text that is too short; AuditError for too few requests.
    """
    codec = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
    try:
        prompts = prompts_of(codec, text[:_MAX_TEXT_CHARS], requests)
    except ValueError as e:
        raise InputError(str(e)) from e
    honest = rehearse(
        store, manifest, prompts, stages=stages, options=prover, tokens=tokens, at_once=at_once, samplings=_SAMPLINGS
    )
    head = load_head(store, manifest, auditor)
    redrawer = Redrawer(manifest, lambda: head, (), Signer.fresh())
    margins = [redrawer.margins(r.receipt, r.records[-1]) for r in honest]
    plain = load_head(store, manifest, replace(prover, engine=TORCH))
    for one in honest:
        margins += _plain_margins(one, floats_of(one.records[-1].sent, prover.dtype, manifest.hidden_size), plain, head)
    band = calibrate_draws(manifest.cid, honest[0].receipt.statements[-1].profile, head.profile, margins)
    replayer = Auditor(store, manifest, auditor, (), Signer.fresh())
    made = []
    for stage in range(stages):
        statements = [r.receipt.statements[stage] for r in honest]
        recorded, replays = replayer.compare(statements, [r.records[stage] for r in honest])
        made.append(calibrate(statements, recorded, replays))
    return made, band


def _plain_margins(one: Rehearsed, rows: Rows, plain: OutputHead, head: OutputHead) -> list[Floats]:
    """Margins of what a plain head in the dtype of the stages draws from these rows, by each sampling.

    Engines use it for steps of many rows, and for few a step of their own that rounds less. A rehearsal has nearly all
    of its tokens from the latter: a band of those alone would accuse whoever serves long prompts.
    """
    receipt = one.receipt.receipt
    key = noise_key(receipt.sampling, one.receipt.opening.client_nonce, receipt.node_nonce)
    draws = [Draw(s.temperature_micro, s.top_k, s.top_p_micro, key, s.min_p_micro) for s in _SAMPLINGS]
    found: list[list[float]] = [[] for _ in draws]
    drawn_from = rows[receipt.n_prompt - 1 :]
    both = zip(plain.logits(drawn_from), head.logits(drawn_from), strict=True)
    for position, (said, true) in enumerate(both, receipt.n_prompt):
        for draw, margins in zip(draws, found, strict=True):
            margins.append(margin(draw, true, position, draw.token(said, position)))
    return [np.array(margins) for margins in found]


def run_demo(cheat: str, stage: int, requests: int) -> int:
    """Tell each step as it is done. Returns 0 if what cheats was found and nobody else was even suspected.

    Whether its rows or its tokens are wrong: it signed for both, and is quarantined by two owners' auditors.
    """
    if cheat not in DISHONEST and cheat not in DISHONEST_SAMPLERS:
        raise InputError(f"no such way to cheat: {cheat!r}. There are: {', '.join((*DISHONEST, *DISHONEST_SAMPLERS))}")
    samples = cheat in DISHONEST_SAMPLERS
    if samples:
        stage = STAGES - 1  # the one that draws
    dtype: ActivationDtype = "bfloat16" if computes_fast_in("bfloat16", "cpu") else "float32"
    prover = LoadOptions("cpu", dtype, PAGE_SIZE, max(1, (os.cpu_count() or 1) // STAGES))
    auditor = LoadOptions("cpu", "float32", PAGE_SIZE, os.cpu_count(), engine=TORCH)
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        _step("Cutting SmolLM2-135M into layers, named by content")
        manifest = split(open_checkpoint(demo_model()), store, "smollm2-135m-instruct", "bfloat16")
        _step(f"Calibrating: {requests} honest requests through {STAGES} stages in {dtype}, replayed in float32")
        text = help_text()
        calibrations, band = calibrated(store, manifest, text, STAGES, requests, _TOKENS, 8, prover, auditor)
        for i, c in enumerate(calibrations):
            print(f"  stage {i}: layers [{c.start}, {c.stop}), {_limits(c)}\n           {c.cid}")
        print(f"  draws: {band_text(band)}\n           {band.cid}")
        _step(f"Serving one request with stage {stage} cheating: {cheat}")
        codec = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
        prompt = codec.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
        answered = rehearse(
            store,
            manifest,
            [tuple(prompt)],
            stages=STAGES,
            options=prover,
            tokens=24,
            cheats={stage: cheat},
            samplings=(Sampling(top_p_micro=9 * MICRO // 10),) if samples else (Sampling(),),
        )[0]
        print(f"  the answer: {codec.decode(list(answered.receipt.receipt.out_ids))!r}")
        print(f"  its receipt {answered.receipt.cid} verifies: signatures say who, not whether it is true")
        auditors = [Auditor(store, manifest, auditor, calibrations, Signer.fresh()) for _ in _OWNERS]
        _step("Auditing every stage, by two auditors of different owners")
        standings = _audited(answered, auditors)
        _step("Drawing its tokens again, from the rows that the last stage signed for")
        head = load_head(store, manifest, auditor)
        for owner in _OWNERS:
            redrawer = Redrawer(manifest, lambda: head, (band,), Signer.fresh())
            redrawn = redrawer.audit(answered.receipt, answered.records[-1], _now_ms())
            standings[-1] = after_draws(standings[-1], redrawn.verdict, owner)
            print(f"  {owner}: {_draws_text(redrawn)}; stage {STAGES - 1} is {standings[-1].state.value}")
    wrong = [f"stage {i}" for i, s in enumerate(standings) if (s.state is State.QUARANTINED) != (i == stage)]
    if (redrawn.verdict.finding == "sampler") != samples:
        wrong.append("its tokens")
    _step("Caught, and nobody else blamed" if not wrong else f"NOT as it should be: {', '.join(wrong)}")
    return int(bool(wrong))


def _audited(answered: Rehearsed, auditors: Sequence[Auditor]) -> list[Standing]:
    table = Table("stage", "error", "limit", "rows", "p", "verdict", "by", "standing")
    standings = []
    for i, statement in enumerate(answered.statements):
        standing = Standing()
        for auditor, owner in zip(auditors, _OWNERS, strict=True):
            audited = auditor.audit(statement, answered.records[i], answered.receipt.statements[i].node, _now_ms())
            standing = after_verdict(standing, audited.verdict, owner)
            table.add_row(str(i), *_cells(audited), owner, standing.state.value)
        standings.append(standing)
    out.print(table)
    return standings


def _cells(audited: Audited) -> tuple[str, ...]:
    j = audited.judgement
    if j is None:
        return "", "", "", "", audited.verdict.finding
    window = f"{j.first}-{j.first + j.tokens - 1}"
    return f"{j.error:.2e}", f"{j.limit:.2e}", window, f"{j.p:.0e}", j.finding


def band_text(band: DrawBand) -> str:
    """For people: how far honest draws lie from their re-draw, and what decides."""
    largest, limit = band.largest_pico / PICO, band.limit(_TOKENS)
    return f"{band.beyond} of {band.draws} honest ones part, by {largest:.3g} logits at most; {limit:.3g} decide"


def _draws_text(redrawn: Redrawn) -> str:
    j, v = redrawn.judgement, redrawn.verdict
    if j is None:
        return v.finding
    seen = f"{j.differing} of {v.tokens} tokens part, by {j.margin:.3g} logits at most (limit {j.limit:.3g})"
    enough = "" if j.found_at is None else f"; the first {j.found_at} were enough"
    return f"{v.finding}: {seen}, evidence {j.evidence:.3g}{enough}"


def _limits(calibration: Calibration) -> str:
    tail = calibration.tails[-1]
    return (
        f"limit {tail.limit(1e-6):.2e} for {tail.tokens} tokens (largest of {tail.samples} honest: {tail.largest:.2e})"
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)
