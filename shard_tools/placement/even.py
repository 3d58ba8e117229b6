"""Contiguous ranges as even as possible, nodes taken in turn: right where all nodes and layers are alike."""

from __future__ import annotations

import itertools

from shard_tools.errors import InputError
from shard_tools.placement.planner import NodeView, Placement, StageView


def plan(n_layers: int, n_stages: int) -> tuple[tuple[int, int], ...]:
    """The layer range [start, stop) of each stage, in order; lengths differ by at most one.

    Raises InputError unless 1 <= n_stages <= n_layers.
    """
    if not 1 <= n_stages <= n_layers:
        raise InputError(f"{n_layers} layers cannot be cut into {n_stages} stages: choose 1 to {n_layers}")
    cuts = [i * n_layers // n_stages for i in range(n_stages + 1)]
    return tuple(itertools.pairwise(cuts))


class EvenPlanner:
    """A Planner that knows nothing of memory or speed."""

    def place(self, n_layers: int, n_stages: int, nodes: tuple[NodeView, ...]) -> Placement:
        if not nodes:
            raise InputError("no node to place stages on")
        ranges = plan(n_layers, n_stages)
        return Placement(
            n_layers, tuple(StageView(a, b, nodes[i % len(nodes)].node_id) for i, (a, b) in enumerate(ranges))
        )
