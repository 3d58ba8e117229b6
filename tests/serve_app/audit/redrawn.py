"""Answers of the tiny model drawn again: a band of its honest draws, and answers to other prompts by any sampler."""

from __future__ import annotations

import functools

from serve_app.audit.band import DrawBand, calibrate_draws
from serve_app.audit.redraw import Redrawer, Redrawn
from serve_app.engine.load import load_head
from serve_app.engine.output_head import OutputHead
from serve_app.messages.request import Sampling
from serve_app.rehearsal import Rehearsed, rehearse
from tests.serve_app.audit.rehearsed import AUDITOR, OPTIONS, REPLAY, STAGES, honest, model, prompts

NOW_MS = 1_790_000_000_000


@functools.cache
def band() -> DrawBand:
    """Of 16 honest answers of 14 tokens."""
    blind = redrawer_of(())
    margins = [blind.margins(r.receipt, r.records[-1]) for r in honest()]
    return calibrate_draws(model()[1].cid, honest()[0].receipt.statements[-1].profile, head().profile, margins)


@functools.cache
def head() -> OutputHead:
    """The auditor's."""
    return load_head(*model(), REPLAY)


def redrawer_of(bands: tuple[DrawBand, ...]) -> Redrawer:
    """One that judges by these."""
    return Redrawer(model()[1], head, bands, AUDITOR)


def redrawn(one: Rehearsed) -> Redrawn:
    """Its verdict, by the honest band."""
    return redrawer_of((band(),)).audit(one.receipt, one.records[-1], NOW_MS)


@functools.cache
def asked(sampling: Sampling, cheat: str | None, count: int) -> list[Rehearsed]:
    """Answers of 24 tokens to other prompts than the band's. cheat: of the last stage, how it draws or computes."""
    cheats = {} if cheat is None else {STAGES - 1: cheat}
    return rehearse(
        *model(), prompts(80, count), stages=STAGES, options=OPTIONS, tokens=24, cheats=cheats, samplings=(sampling,)
    )
