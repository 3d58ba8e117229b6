"""How far honest draws of one kind lie from their re-draw, and what the draws of an answer show against that.

The rule, on the margins of all tokens of an answer (margin.py):
    p          of one margin: 1 up to FLOOR, else how often an honest draw lies so far, by an exponential tail: heavier
               than that of rounding, which is bounded. (A Pareto tail fitted to 54 margins, none past 0.23 logits, put
               the limit at 2.4: a runner-up drawn once in 100 tokens took 311 tokens to find, where this takes 64)
    evidence   an e-value of all: at each token some shares of what was gathered are bet against honesty. Its mean is at
               most 1 for an honest sampler, and it passes 10^6 at any time with a probability of at most 10^-6
    sampler    evidence passed 10^6, or one token is past `limit`: p times all tokens <= 10^-6, and its margin more than
               GUARD times the largest honest one
    suspect    evidence passed 10^4
Law: `DrawBand.decode(b.encode()) == b`. Integers only, so a band has one CID. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from serve_app.audit.error import Floats
from serve_app.audit.tail import MAX_PICO, PICO
from serve_app.audit.verdict import FAULT_P, GUARD, SUSPECT_P
from serve_app.errors import AuditError
from serve_app.receipts.statement import MAX_ROWS, manifest_link
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError

# Logits. Heads in float32 agree to some 1e-5, so this is never reached by them and never needed by who gains by it; and
# it keeps a sample in which no two draws parted from making any difference at all an impossible one.
FLOOR = 1e-3
MIN_DRAWS = 200
MAX_BAND_BYTES = 1 << 10
_MIN_BEYOND = 20  # fewer do not fit a tail
_MAX_PROFILE = 200
_SHARES = (0.3, 0.03, 0.003)  # of what was gathered, put on each token: for liars about one in 3, in 30, in 300
_LEAST_P = FAULT_P  # one token alone is no more evidence than that, however far a fit is extrapolated

DrawFinding = Literal["pass", "suspect", "sampler"]


@dataclass(frozen=True, slots=True)
class DrawJudgement:
    """What the margins of one answer, or of several one after another, show."""

    finding: DrawFinding
    evidence: float  # e-value of all tokens
    differing: int  # tokens past FLOOR
    worst: int  # index of the token with the largest margin
    margin: float  # its
    limit: float  # the margin at which one token alone decides
    found_at: int | None  # how many tokens were enough; None: all were not


@dataclass(frozen=True)
class DrawBand:
    """One honest pair: a last stage, and whoever draws from its rows again."""

    manifest: Cid
    prover: str  # StageStatement.profile
    auditor: str  # OutputHead.profile
    draws: int
    beyond: int  # of them, those past FLOOR
    scale_pico: int
    largest_pico: int

    @cached_property
    def cid(self) -> Cid:
        """The name of this file."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def p_value(self, margin: float) -> float:
        """An upper bound, as far as the fit holds, of how often an honest draw has such a margin or a larger one."""
        if margin <= FLOOR:
            return 1.0
        if not math.isfinite(margin):
            return 0.0
        return self._rate * math.exp(-(margin - FLOOR) * PICO / self.scale_pico)

    def limit(self, tokens: int) -> float:
        """The margin past which one of so many tokens decides."""
        depth = math.log(max(self._rate * tokens / FAULT_P, 1.0))
        return max(FLOOR + self.scale_pico * depth / PICO, GUARD * self.largest_pico / PICO)

    @property
    def _rate(self) -> float:
        """Of honest draws past FLOOR, at most: two deviations above what was seen, and the rule of three for none."""
        return min(1.0, (self.beyond + 2 * math.sqrt(self.beyond) + 3) / self.draws)

    def encode(self) -> bytes:
        """The bytes of the file."""
        return canonical.encode(
            {
                "v": 1,
                "manifest": self.manifest,
                "prover": self.prover,
                "auditor": self.auditor,
                "draws": self.draws,
                "beyond": self.beyond,
                "scale_pico": self.scale_pico,
                "largest_pico": self.largest_pico,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> DrawBand:
        """Read a file. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_BAND_BYTES), "band") as f:
            f.integer("v", 1, 1)
            band = cls(
                manifest_link(f),
                f.text("prover", _MAX_PROFILE),
                f.text("auditor", _MAX_PROFILE),
                f.integer("draws", MIN_DRAWS, MAX_PICO),
                f.integer("beyond", 0, MAX_PICO),
                f.integer("scale_pico", 1, MAX_PICO),
                f.integer("largest_pico", 0, MAX_PICO),
            )
        if band.beyond > band.draws:
            raise FormatError(f"band.beyond: {band.beyond} of {band.draws} draws")
        return band


def calibrate_draws(manifest: Cid, prover: str, auditor: str, margins: Sequence[Floats]) -> DrawBand:
    """The band of honest margins, of the tokens of each answer.

    Greedy ones belong among them: noise seldom lets two meet that nearly tie, so under it rounding shows too seldom to
    be measured by some thousand draws. Raises AuditError if there are too few, or impossible ones.
    """
    every = np.concatenate(margins) if margins else np.zeros(0)
    if len(every) < MIN_DRAWS:
        raise AuditError(f"{len(every)} draws are too few to calibrate by: {MIN_DRAWS} are the least")
    if not np.isfinite(every).all():
        raise AuditError("an honest draw was impossible, so nothing can be calibrated by it")
    above = every[every > FLOOR] - FLOOR
    largest = float(every.max())
    # Two deviations above their mean; where they are too few to have one, as if each were about the largest.
    enough = len(above) >= _MIN_BEYOND
    scale = float(above.mean()) * (1 + 2 / math.sqrt(len(above))) if enough else largest
    return DrawBand(
        manifest,
        prover,
        auditor,
        len(every),
        len(above),
        min(math.ceil(max(scale, FLOOR) * PICO), MAX_PICO),
        min(math.ceil(largest * PICO), MAX_PICO),
    )


def judge_draws(margins: Floats, band: DrawBand) -> DrawJudgement:
    """The judgement of these margins, in the order in which the tokens were drawn."""
    n = len(margins)
    assert 0 < n <= MAX_ROWS
    limit = band.limit(n)
    p = np.array([band.p_value(m) for m in margins.tolist()])
    e = 0.5 / np.sqrt(np.maximum(p, _LEAST_P))  # an e-value of any p-value: Vovk and Wang 2021, kappa 1/2
    # A bet of a fixed share at each token: a product of e-values, whatever the tokens before were; a mean of such.
    logs = np.cumsum([np.log1p(share * (e - 1)) for share in _SHARES], axis=1)
    top = logs.max(0)
    gathered = top + np.log(np.exp(logs - top).mean(0))
    found = np.flatnonzero((gathered >= -math.log(FAULT_P)) | (margins > limit))
    suspected = bool((gathered >= -math.log(SUSPECT_P)).any())
    finding: DrawFinding = "sampler" if len(found) else "suspect" if suspected else "pass"
    worst = int(np.argmax(margins))
    return DrawJudgement(
        finding,
        math.exp(min(float(gathered[-1]), 700.0)),
        int((margins > FLOOR).sum()),
        worst,
        float(margins[worst]),
        limit,
        int(found[0]) + 1 if len(found) else None,
    )
