"""Draws one token from one row of logits, by one rule on every machine.

Given equal logits the draw depends only on (sampling, tokens so far, key, position): all arithmetic after the logits is
float64 on the CPU, ties go to the lowest id, and the noise is Philox by (position, token id). Only the last bits of exp
and log may differ between builds of numpy. What else is in the batch cannot matter, since a row is drawn alone.
PROTOCOL.md says how an auditor repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.engine.penalties import Penalties
from serve_app.engine.philox import uniform_bits
from serve_app.errors import ProtocolError
from serve_app.messages.request import MICRO
from serve_app.messages.step import DRAW_EACH, StepPlan

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Gumbel noise of a 32-bit uniform lies in (-log(log(2^33)), log(2^33)) = (-3.13, 22.88): a token whose scaled logit
# is further below the best one's can never win, so its noise need not be made.
_REACH = 26.1


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw for one sequence (messages/step.py OPEN)."""

    temperature_micro: int
    top_k: int
    top_p_micro: int
    key: bytes
    min_p_micro: int = 0

    def token(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The token at `position` of the sequence. logits: [vocab] float32, finite."""
        if self.temperature_micro == 0:
            return int(np.argmax(logits))  # the first of equals: the lowest id
        scaled = logits.astype(np.float64) / (self.temperature_micro / MICRO)
        ids = self._candidates(scaled)
        if self.min_p_micro:
            ids = ids[scaled[ids] - scaled.max() >= math.log(self.min_p_micro / MICRO)]
        noise = gumbel(self.key, position, ids)
        return int(ids[np.argmax(scaled[ids] + noise)])

    def _candidates(self, scaled: Floats) -> Ids:
        """Ids that top-k and top-p leave, ascending, less those no noise could lift to the top."""
        if self.top_k:
            order = _best(scaled, self.top_k)[: self.top_k]
            weights = np.exp(scaled[order] - scaled[order[0]])
            keep = _reach(weights, float(weights.sum()), self.top_p_micro)
            return np.sort(order if keep is None else order[:keep])
        if self.top_p_micro < MICRO:
            total = float(np.exp(scaled - scaled.max()).sum())
            size = 64  # most nuclei are small: sort few, and more only where that was not enough
            while True:
                order = _best(scaled, size)
                keep = _reach(np.exp(scaled[order] - scaled[order[0]]), total, self.top_p_micro)
                if keep is not None or len(order) == len(scaled):
                    return np.sort(order if keep is None else order[:keep])
                size *= 8
        return np.flatnonzero(scaled >= scaled.max() - _REACH)


class SequenceDraw:
    """How one open sequence draws, and what it has drawn."""

    def __init__(self, draw: Draw, penalties: Penalties | None) -> None:
        self._draw, self._penalties = draw, penalties

    @property
    def counts(self) -> bool:
        """Whether what is drawn here changes what is drawn later."""
        return self._penalties is not None and self._penalties.counts

    def token(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The token at `position`, which counts from then on. logits: [vocab] float32, finite."""
        if self._penalties is None:
            return self._draw.token(logits, position)
        token = self._draw.token(self._penalties.applied(logits), position)
        self._penalties.add(token)
        return token


def opened_draws(plan: StepPlan, n_vocab: int) -> dict[int, SequenceDraw]:
    """By sequence: those that open in this plan. Raises ProtocolError for a token outside the vocabulary."""
    controls = {one.seq: one for one in plan.controls}
    for beyond in (plan.controls.ids, plan.controls.biases["id"]):
        if len(beyond) and int(beyond.max()) >= n_vocab:
            raise ProtocolError(f"token id {int(beyond.max())} in a vocabulary of {n_vocab}")
    out = {}
    for o in plan.opens:
        one = controls.get(int(o["seq"]))
        fields = int(o["temperature_micro"]), int(o["top_k"]), int(o["top_p_micro"]), o["key"].tobytes()
        draw = Draw(*fields, 0 if one is None else one.min_p_micro)
        touched = one is not None and (one.counts or len(one.biases))
        out[int(o["seq"])] = SequenceDraw(draw, Penalties(one, n_vocab) if one is not None and touched else None)
    return out


def require_no_counts(plan: StepPlan, draws: Callable[[int], SequenceDraw | None]) -> None:
    """Raises ProtocolError for guesses of a sequence whose draws count: those that are void would have been counted.

    draws: of a sequence that is open or opens.
    """
    for seq in plan.spans["seq"][plan.spans["sample"] == DRAW_EACH].tolist():
        own = draws(seq)
        if own is not None and own.counts:
            raise ProtocolError(f"guesses of sequence {seq}, which is penalised for what it draws")


def _best(scaled: Floats, n: int) -> Ids:
    """The n best ids and whatever ties with the last of them; best first, equals by lowest id."""
    if n >= len(scaled):
        return np.lexsort((np.arange(len(scaled)), -scaled))
    ids = np.flatnonzero(scaled >= np.partition(scaled, -n)[-n])
    return ids[np.argsort(-scaled[ids], kind="stable")]


def _reach(weights: Floats, total: float, top_p_micro: int) -> int | None:
    """How many of the best make up top_p of the total; None if all of them do not."""
    if top_p_micro == MICRO:
        return None
    reached = np.cumsum(weights) >= total * (top_p_micro / MICRO)
    return int(np.argmax(reached)) + 1 if reached.any() else None


def gumbel(key: bytes, position: int, ids: Ids) -> Floats:
    """Standard Gumbel noise for these token ids. u = (bits + 1/2) / 2^32, so u is never 0 or 1."""
    bits: npt.NDArray[Any] = uniform_bits(key, position, ids.astype(np.uint32))
    u = (bits.astype(np.float64) + 0.5) / 4294967296.0
    return -np.log(-np.log(u))
