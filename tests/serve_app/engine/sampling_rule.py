"""PROTOCOL.md's "Sampling", written a second time: with Python's own integers and floats, one token at a time.

Shares nothing with the engines but the type that says what was asked. Slow, and as plain as the page.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from serve_app.messages.request import MICRO, Sampling


def word(key: bytes, position: int, token: int) -> int:
    """Word token % 4 of Philox4x32-10 at counter (position, token // 4, 0, 0)."""
    return philox((position, token // 4, 0, 0), struct.unpack("<2I", key))[token % 4]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four words of Philox4x32-10."""
    low = (1 << 32) - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & low, first >> 32 ^ c3 ^ k1, first & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def noise(key: bytes, position: int, token: int) -> float:
    """Gumbel noise."""
    return -math.log(-math.log((word(key, position, token) + 0.5) / 2**32))


def touched(logits: Sequence[float], asked: Sampling, prompt: Sequence[int], drawn: Sequence[int]) -> list[float]:
    """Steps 1 and 2: bias and penalties, each rounded to float32."""
    out = [float(x) for x in logits]
    for token, micro in asked.logit_bias:
        out[token] = float32(out[token] + micro / 1e6)
    if asked.penalises:
        for token in {*prompt, *drawn}:
            x, times = out[token], list(drawn).count(token)
            if asked.repetition_micro != MICRO:
                x = x * 1e6 / asked.repetition_micro if x > 0 else x * asked.repetition_micro / 1e6
            if times:
                x -= (asked.presence_micro + asked.frequency_micro * times) / 1e6
            out[token] = float32(x)
    return out


def left(scaled: Sequence[float], asked: Sampling) -> list[int]:
    """Steps 4 to 6: the ids that top-k, top-p and min-p leave, best first."""
    kept = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = kept[: asked.top_k or len(kept)]
    best = max(scaled)
    if asked.top_p_micro < MICRO:
        weights = [math.exp(scaled[i] - best) for i in kept]
        wanted, sum_ = sum(weights) * (asked.top_p_micro / 1e6), 0.0
        for n, weight in enumerate(weights, 1):
            sum_ += weight
            if sum_ >= wanted:
                kept = kept[:n]
                break
    if asked.min_p_micro:
        kept = [i for i in kept if scaled[i] - best >= math.log(asked.min_p_micro / 1e6)]
    return kept


def token(
    logits: Sequence[float], asked: Sampling, key: bytes, position: int, prompt: Sequence[int], drawn: Sequence[int]
) -> int:
    """What is drawn."""
    x = touched(logits, asked, prompt, drawn)
    if asked.temperature_micro == 0:
        return x.index(max(x))
    scaled = [value / (asked.temperature_micro / 1e6) for value in x]
    return min(left(scaled, asked), key=lambda i: (-(scaled[i] + noise(key, position, i)), i))


def probabilities(logits: Sequence[float], asked: Sampling, prompt: Sequence[int], drawn: Sequence[int]) -> list[float]:
    """The distribution that was asked for."""
    scaled = [x / (asked.temperature_micro / 1e6) for x in touched(logits, asked, prompt, drawn)]
    kept = left(scaled, asked)
    total = sum(math.exp(scaled[i] - scaled[kept[0]]) for i in kept)
    return [math.exp(scaled[i] - scaled[kept[0]]) / total if i in kept else 0.0 for i in range(len(scaled))]


def float32(x: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])
