"""Samplers that do not draw as they were asked, over honest logits: for tests, benchmarks and demonstrations of audits.

The rows of such a stage are right and pass every replay; only its tokens are not those that the request's noise gives.
Nothing that serves imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from serve_app.engine.philox import uniform_bits
from serve_app.engine.sampler import Draw, SequenceDraw
from serve_app.engine.torch_engine import TorchEngine
from serve_app.messages.request import MICRO

_WHEN = b"llmd bug"  # keys the choice of positions at which a seldom bug strikes
_SELDOM = 100  # one token of so many


@dataclass(frozen=True, slots=True)
class _Seldom(Draw):
    """Draws as it should but for one token of a hundred."""

    def token(self, logits: npt.NDArray[np.float32], position: int) -> int:
        honest = self._honest()
        if uniform_bits(_WHEN, position ^ int.from_bytes(self.key[:3], "little"), np.zeros(1, np.uint32))[0] % _SELDOM:
            return honest.token(logits, position)
        return self._wrong(honest, logits, position)

    def _honest(self) -> Draw:
        return Draw(self.temperature_micro, self.top_k, self.top_p_micro, self.key, self.min_p_micro)

    def _wrong(self, honest: Draw, logits: npt.NDArray[np.float32], position: int) -> int:
        """What the same request would draw by other noise."""
        return replace(honest, key=_other(self.key)).token(logits, position)


@dataclass(frozen=True, slots=True)
class _SeldomSecond(_Seldom):
    """Its wrong tokens are those that came second."""

    def _wrong(self, honest: Draw, logits: npt.NDArray[np.float32], position: int) -> int:
        without = logits.copy()
        without[honest.token(logits, position)] = np.finfo(np.float32).min
        return honest.token(without, position)


def _other(key: bytes) -> bytes:
    return bytes(b ^ 0xFF for b in key)


def _as(kind: type[Draw]) -> Callable[[Draw], Draw]:
    return lambda d: kind(d.temperature_micro, d.top_k, d.top_p_micro, d.key, d.min_p_micro)


DISHONEST_SAMPLERS: Mapping[str, Callable[[Draw], Draw]] = {
    "greedy": lambda d: replace(d, temperature_micro=0),
    "cooler": lambda d: replace(d, temperature_micro=d.temperature_micro * 7 // 10),
    "slightly-cooler": lambda d: replace(d, temperature_micro=d.temperature_micro * 95 // 100),
    "narrow-top-p": lambda d: replace(d, top_p_micro=d.top_p_micro * 8 // 10),
    "no-top-p": lambda d: replace(d, top_p_micro=MICRO),
    "other-seed": lambda d: replace(d, key=_other(d.key)),
    "seldom-other-noise": _as(_Seldom),
    "seldom-second": _as(_SeldomSecond),
}


class _Draws(dict[int, SequenceDraw]):
    """Open sequences, each of which draws dishonestly."""

    def __init__(self, cheat: Callable[[Draw], Draw]) -> None:
        super().__init__()
        self._cheat = cheat

    def __ior__(self, opened: Mapping[int, SequenceDraw]) -> _Draws:  # type: ignore[override,misc]
        self.update({seq: SequenceDraw(self._cheat(own._draw), own._penalties) for seq, own in opened.items()})
        return self


def draw_dishonestly(engine: TorchEngine, attack: str) -> None:
    """The engine of a last stage draws from now on in this way, one of DISHONEST_SAMPLERS."""
    assert engine.has_head, "only the last stage draws"
    engine._draws = _Draws(DISHONEST_SAMPLERS[attack])
