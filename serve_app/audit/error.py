"""How far recorded rows lie from replayed ones, in numbers that honest rounding keeps small and steady.

One number a row: the length of the difference over that of the replayed row, every channel divided by its usual size
first. A few channels of a transformer are hundreds of times larger than the rest and would drown what happens in the
others (a raw relative error finds int8 weights in 36 of 100 tokens where the whitened one finds 100).
float64 from exactly widened inputs: the same rows give the same number wherever numpy adds in the same order.
Knows nothing of thresholds, and nothing of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serve_app.engine.engine import ActivationDtype

Rows = npt.NDArray[np.float32]  # [rows, width]
Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-6  # of the largest channel's size: a channel that is always 0 must not make every error infinite


def floats_of(rows: bytes | memoryview, dtype: ActivationDtype, width: int) -> Rows:
    """The values of hidden rows, exactly; a copy."""
    if dtype == "bfloat16":
        widened = np.frombuffer(rows, "<u2").astype(np.uint32) << 16
        return widened.view(np.float32).reshape(-1, width)
    kind = {"float32": "<f4", "float16": "<f2"}[dtype]
    return np.frombuffer(rows, kind).astype(np.float32).reshape(-1, width)


def channel_sizes(replayed: Sequence[Rows]) -> Floats:
    """[width]: the usual size of each channel, as the median over records of its root mean square."""
    each = [np.sqrt(np.mean(np.square(rows, dtype=np.float64), 0)) for rows in replayed]
    sizes: Floats = np.median(each, 0)
    return np.maximum(sizes, max(float(sizes.max()), np.finfo(np.float64).tiny) * _SMALLEST)


def whitened_errors(recorded: Rows, replayed: Rows, sizes: Floats) -> Floats:
    """[rows]: the error of each; infinite where a recorded row holds what is no number."""
    assert recorded.shape == replayed.shape and recorded.shape[1:] == sizes.shape
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        reference = replayed.astype(np.float64) / sizes
        difference = recorded.astype(np.float64) / sizes - reference
        far, whole = np.sqrt(np.square(difference).sum(1)), np.sqrt(np.square(reference).sum(1))
        errors = np.where(far == 0, 0.0, far / whole)
    return np.where(np.isfinite(errors), errors, np.inf)


def eased(errors: Floats, nudged: Floats, usual: float) -> Floats:
    """[rows]: errors divided by how much more than usual a row carries rounding, where it carries more.

    nudged: how far the replay moves if its rows are off by their last bit. A neighbour that sends what no honest stage
    sends, or a strange prompt, must not make an honest stage look as if it erred.
    """
    with np.errstate(invalid="ignore"):
        found: Floats = errors / np.maximum(1.0, nudged / usual)
    return np.where(np.isfinite(found), found, np.inf)


def window_means(errors: Floats, tokens: int) -> Floats:
    """Mean error of each window of `tokens` rows, one after another from the first; a shorter rest has none."""
    n = len(errors) // tokens
    means: Floats = errors[: n * tokens].reshape(n, tokens).mean(1)
    return means
