"""The seam between a model and the nodes that serve it: deciding, as a pure function.

Laws: the stages of a placement tile layers [0, n) exactly, in order, each with at least one layer;
equal views give equal placements. Doing what was decided is somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a planner may know of a node."""

    node_id: str
    memory_bytes: int  # free for weights and KV pages
    has_gpu: bool


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of a placement: layers [start, stop) on one node."""

    start: int
    stop: int
    node_id: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Who serves which layers. Constructing one that does not tile the layers is our own mistake (assert)."""

    n_layers: int
    stages: tuple[StageView, ...]

    def __post_init__(self) -> None:
        at = 0
        for stage in self.stages:
            assert stage.start == at < stage.stop, self
            at = stage.stop
        assert at == self.n_layers, self


class Planner(Protocol):
    """Decides which node serves which layers."""

    def place(self, n_layers: int, n_stages: int, nodes: tuple[NodeView, ...]) -> Placement:
        """Raises InputError if the layers cannot be placed so."""
