"""How often honest rows err by so much: counted where there were enough of them, extrapolated beyond.

Below the 90 % point of the honest sample its deciles say it. Above, a generalised Pareto distribution fitted to what
lies there by probability-weighted moments, whose shape is kept between 0 and 1/2: never a tail that ends, because a fit
to some hundred values that says so would make the next honest value an impossible one.
Source: Hosking and Wallis 1987, "Parameter and quantile estimation for the generalized Pareto distribution", section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from serve_app.audit.error import Floats

PICO = 10**12  # errors are written as integers in millionths of millionths: float32 stages err by 1e-7
MICRO = 10**6
MAX_PICO = 1 << 53
MIN_SAMPLES = 100  # fewer say nothing of a tail
DECILES = 9
_SHAPE_MICRO = (0, MICRO // 2)


@dataclass(frozen=True, slots=True)
class Tail:
    """The honest distribution of the mean error of `tokens` rows, in integers so that it has one spelling."""

    tokens: int
    samples: int
    deciles_pico: tuple[int, ...]  # 10 % .. 90 %, rising
    scale_pico: int
    shape_micro: int
    largest_pico: int  # that was seen

    def p_value(self, error: float) -> float:
        """An upper bound, as far as the fit holds, of how often an honest window errs by as much or more."""
        if not math.isfinite(error):
            return 0.0
        pico = error * PICO
        above = pico - self.deciles_pico[-1]
        if above <= 0:
            return 1.0 - sum(d <= pico for d in self.deciles_pico) / (DECILES + 1)
        shape = self.shape_micro / MICRO
        relative = above / self.scale_pico
        return 0.1 * (math.exp(-relative) if shape == 0 else math.exp(-math.log1p(shape * relative) / shape))

    def limit(self, p: float) -> float:
        """The error that an honest window reaches with probability p, at most 0.1."""
        assert 0 < p <= 0.1
        shape, depth = self.shape_micro / MICRO, math.log(0.1 / p)
        above = depth if shape == 0 else math.expm1(shape * depth) / shape
        return (self.deciles_pico[-1] + self.scale_pico * above) / PICO

    @property
    def largest(self) -> float:
        """The largest honest error that was seen."""
        return self.largest_pico / PICO


def fit(tokens: int, errors: Floats) -> Tail:
    """The tail of honest mean errors [samples] over `tokens` rows each."""
    assert len(errors) >= MIN_SAMPLES and bool(np.isfinite(errors).all())
    deciles = np.quantile(errors, np.arange(1, DECILES + 1) / (DECILES + 1))
    above = np.sort(errors[errors > deciles[-1]]) - deciles[-1]
    shape, scale = 0.0, 0.0
    if len(above):
        rank = np.arange(len(above))
        first = float(above.mean())
        second = float((above * (1 - (rank + 0.65) / len(above))).mean())  # estimates E[X (1 - F(X))]
        shape = min(max(2 - first / (first - 2 * second), 0.0), _SHAPE_MICRO[1] / MICRO) if first > 2 * second else 0.5
        scale = first * (1 - shape)  # keeps the mean of what lies above, whatever the shape was kept to
    return Tail(
        tokens,
        len(errors),
        tuple(_pico(d) for d in deciles),
        max(_pico(scale), 1),
        round(shape * MICRO),
        _pico(float(errors.max())),
    )


def scaled(value: float, unit: int) -> int:
    """In whole units, rounded up; what is beyond the largest, infinities too, is the largest."""
    many = value * unit
    return MAX_PICO if not many < MAX_PICO else math.ceil(many)


def _pico(value: float) -> int:
    return min(math.ceil(value * PICO), MAX_PICO)
