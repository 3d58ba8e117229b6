"""What a sequence's own tokens and a client's bias do to a row of logits before a token is drawn from it.

One rule on every machine, to the last bit: each operation is one that IEEE 754 rounds exactly, in float64, and no
product is followed by a sum that a compiler might fuse with it. Step by step: PROTOCOL.md, "Sampling".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import PipelineError
from serve_app.messages.controls import SequenceControls
from serve_app.messages.request import MICRO

Logits = npt.NDArray[np.float32]


class Penalties:
    """One sequence's controls and the tokens it holds."""

    def __init__(self, controls: SequenceControls, n_vocab: int) -> None:
        self._presence, self._frequency = controls.presence_micro, controls.frequency_micro
        self._repetition, self.counts = controls.repetition_micro, controls.counts
        self._bias_ids = controls.biases["id"].astype(np.int64)
        self._bias = controls.biases["micro"] / MICRO
        prompt, drawn = controls.ids[: controls.n_prompt], controls.ids[controls.n_prompt :]
        self._held = np.zeros(n_vocab if self.counts else 0, np.bool_)  # in the prompt, or drawn
        self._drawn = np.zeros(len(self._held), np.int64)  # how often
        self._held[prompt] = True
        for token in drawn.tolist():
            self.add(token)

    def add(self, token: int) -> None:
        """It was drawn."""
        if self.counts:
            self._held[token] = True
            self._drawn[token] += 1

    def applied(self, logits: Logits) -> Logits:
        """A row of its own, [vocab]. Raises PipelineError if one leaves float32's range."""
        out = logits.copy()
        out[self._bias_ids] = out[self._bias_ids].astype(np.float64) + self._bias
        ids = np.flatnonzero(self._held)
        x: npt.NDArray[Any] = out[ids].astype(np.float64)
        if self._repetition != MICRO:
            x = np.where(x > 0, x * MICRO / self._repetition, x * self._repetition / MICRO)
        n = self._drawn[ids]
        owed = np.where(n > 0, self._presence + self._frequency * n, 0)  # whole millionths
        with np.errstate(over="ignore"):
            out[ids] = x - owed / MICRO
        if not np.isfinite(out).all():
            raise PipelineError("penalties took a logit beyond float32's range")
        return out
