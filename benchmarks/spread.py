"""Many measurements in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of a hundred lie, between neighbours in proportion. At least one value."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Sequence[float], digits: int = 1) -> dict[str, float] | None:
    """p50, p90 and p99, rounded; None if nothing was measured."""
    return {f"p{p}": round(percentile(values, p), digits) for p in PERCENTILES} if values else None


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line that fits best (least squares); 0 for fewer than two different xs."""
    n = len(xs)
    if n < 2:
        return 0.0
    x0, y0 = sum(xs) / n, sum(ys) / n
    width = sum((x - x0) ** 2 for x in xs)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / width if width else 0.0
