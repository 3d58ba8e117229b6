"""Equal shares of layers, in order."""

from __future__ import annotations

from shard_tools.errors import InputError


def plan(n_layers: int, n_stages: int) -> tuple[tuple[int, int], ...]:
    """Half-open layer ranges of n_stages stages, none longer than another by more than one layer."""
    if not 1 <= n_stages <= n_layers:
        raise InputError(f"{n_layers} layers cannot be shared by {n_stages} stages: each needs at least one")
    cuts = [n_layers * i // n_stages for i in range(n_stages + 1)]
    return tuple(zip(cuts, cuts[1:], strict=False))
