"""The numbers that say how well a measure tells cheats from honest rows, and a published rule to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serve_app.audit.error import Floats, Rows, window_means
from serve_app.audit.tail import MIN_SAMPLES, fit
from serve_app.audit.verdict import FAULT_P, GUARD

TOKENS = (1, 2, 4, 8, 16, 32)
CONFIDENCE = 0.95
FALSE_ALARMS = 1e-4  # of the honest test windows, for the share found at a threshold taken from the test itself
PARTIAL = 0.01  # false-positive rate up to which the area under the curve counts
# TOPLOC, arXiv 2501.16007, sections 4 and 5, for bfloat16: of the 128 largest values of a chunk of 32 rows at most 38
# may have another exponent or be no longer among them; mantissas of the others differ by 10 and 8 at most.
TOPLOC_ROWS, TOPLOC_VALUES, TOPLOC_LOST, TOPLOC_MEAN, TOPLOC_MEDIAN = 32, 128, 38, 10.0, 8.0


def limits_of(errors: Sequence[Floats]) -> dict[int, float]:
    """By window length, where there are enough windows, as the verdict has it for one window."""
    out = {}
    for n in TOKENS:
        means = np.concatenate([window_means(e, n) for e in errors])
        if len(means) >= MIN_SAMPLES:
            tail = fit(n, means)
            out[n] = max(tail.limit(FAULT_P), GUARD * tail.largest)
    return out


def last_windows(errors: Sequence[Floats], n: int) -> Floats:
    """[requests]: the mean error of the last n rows of each."""
    return np.array([e[-n:].mean() for e in errors])


def counted(errors: Sequence[Floats], limits: dict[int, float]) -> dict[str, Any]:
    """How many requests are past the limit, by window length, and how large errors are."""
    every = np.concatenate(errors)
    return {
        "past_limit": {str(n): int((last_windows(errors, n) > limit).sum()) for n, limit in limits.items()},
        "of": len(errors),
        "median_error": float(f"{np.median(every):.3g}"),
        "largest_error": float(f"{every.max():.3g}"),
    }


def told_apart(honest: Sequence[Floats], cheat: Sequence[Floats]) -> dict[str, list[float]]:
    """By window length: the share found at FALSE_ALARMS of these honest windows, and the area under the curve up to
    PARTIAL false positives, of 1."""
    out = {}
    for n in TOKENS:
        good, bad = np.sort(last_windows(honest, n)), np.sort(last_windows(cheat, n))
        allowed = int(len(good) * FALSE_ALARMS)
        found = float((bad > good[len(good) - 1 - allowed]).mean())
        # Of each of the highest honest windows: how many cheats lie above it.
        highest = good[len(good) - max(1, int(len(good) * PARTIAL)) :]
        area = float((1 - np.searchsorted(bad, highest, "right") / len(bad)).mean())
        out[str(n)] = [round(found, 5), round(area, 5)]
    return out


def with_total(case: dict[str, Any]) -> dict[str, Any]:
    """With the share over all stages, and its interval."""
    of, shares = sum(stage["of"] for stage in case.values()), {}
    for n in set.intersection(*(set(stage["past_limit"]) for stage in case.values())):
        past = sum(stage["past_limit"][n] for stage in case.values())
        low, high = clopper_pearson(past, of)
        shares[n] = [round(past / of, 6), round(low, 6), round(high, 6)]
    return case | {"share_and_interval": dict(sorted(shares.items(), key=lambda item: int(item[0])))}


def toploc_accepts(sent: Rows, replayed: Rows) -> bool:
    """What TOPLOC's published rule says of the last TOPLOC_ROWS rows of one boundary; bfloat16's bits of both."""
    ours, theirs = (_bits(rows[-TOPLOC_ROWS:]) for rows in (sent, replayed))
    top = np.argpartition(np.abs(sent[-TOPLOC_ROWS:]).reshape(-1), -TOPLOC_VALUES)[-TOPLOC_VALUES:]
    largest = np.argpartition(np.abs(replayed[-TOPLOC_ROWS:]).reshape(-1), -TOPLOC_VALUES)[-TOPLOC_VALUES:]
    alike = np.isin(top, largest) & (ours[top] >> 7 & 255 == theirs[top] >> 7 & 255)
    if TOPLOC_VALUES - int(alike.sum()) > TOPLOC_LOST:
        return False
    apart = np.abs((ours[top[alike]] & 127).astype(int) - (theirs[top[alike]] & 127))
    return bool(apart.mean() <= TOPLOC_MEAN and np.median(apart) <= TOPLOC_MEDIAN)


def clopper_pearson(found: int, of: int) -> tuple[float, float]:
    """The exact interval of a share, at CONFIDENCE. Source: Clopper and Pearson 1934."""

    def at_most(p: float, k: int) -> float:
        i = np.arange(k + 1)
        logs = [math.lgamma(of + 1) - math.lgamma(j + 1) - math.lgamma(of - j + 1) for j in i.tolist()]
        return float(np.exp(np.array(logs) + i * math.log(p) + (of - i) * math.log1p(-p)).sum())

    def where(holds: Callable[[float], bool]) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    if 2 * found > of:  # fewer terms
        low, high = clopper_pearson(of - found, of)
        return 1 - high, 1 - low
    rest = (1 - CONFIDENCE) / 2
    lower = 0.0 if found == 0 else where(lambda p: 1 - at_most(p, found - 1) < rest)
    upper = 1.0 if found == of else where(lambda p: at_most(p, found) > rest)
    return lower, upper


def _bits(rows: Rows) -> Any:
    """[values] uint16: those of the nearest bfloat16."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32).reshape(-1)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
