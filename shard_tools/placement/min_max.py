"""Contiguous ranges of which the heaviest is as light as can be: right where stages work side by side on nodes alike.

What a step of few rows costs a GPU is what it must read, so a layer weighs its bytes, and the last stage also bears the
head: in a Llama of 8B parameters as much as 2.4 layers, in SmolLM2-135M as much as 8.
"""

from __future__ import annotations

from collections.abc import Sequence

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest


def plan(manifest: Manifest, n_stages: int) -> tuple[tuple[int, int], ...]:
    """The layer range [start, stop) of each stage, in order. Raises InputError unless 1 <= n_stages <= layers."""
    weights = [
        sum(manifest.tensor(ref).size for ref in unit.tensors)
        for unit in manifest.units
        if unit.kind in ("layer", "head")
    ]
    return cut(weights[:-1], weights[-1], n_stages)


def cut(layers: Sequence[int], head: int, n_stages: int) -> tuple[tuple[int, int], ...]:
    """As plan, of layers that weigh so much and a head that goes with the last of them.

    Of the cuts that are equally good, the one that fills earlier stages first. Raises InputError.
    """
    if not 1 <= n_stages <= len(layers):
        raise InputError(f"{len(layers)} layers cannot be cut into {n_stages} stages: choose 1 to {len(layers)}")
    costs = [*layers[:-1], layers[-1] + head]
    low, high = max(costs), sum(costs)
    while low < high:  # the least weight that every stage can keep to
        middle = (low + high) // 2
        if len(_fill(costs, middle, n_stages)) <= n_stages:
            high = middle
        else:
            low = middle + 1
    ends = _fill(costs, low, n_stages)
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def _fill(costs: Sequence[int], most: int, n_stages: int) -> list[int]:
    """Where each stage ends if each takes what it may, but leaves a layer for every stage to come; more than n_stages

    ends if they cannot bear it all.
    """
    ends, weight = list[int](), 0
    for i, cost in enumerate(costs):
        left = n_stages - len(ends) - 1  # stages after the one that fills
        if i and (weight + cost > most or len(costs) - i <= left):
            ends.append(i)
            weight = 0
        weight += cost
    return [*ends, len(costs)]
