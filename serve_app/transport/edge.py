"""The seam between neighbours: a way to hand one message to a peer, in order.

The receiving side is a function that takes bytes; how they get there is the edge's business. An edge of plain
calls in one process ships here and is the reference; cluster/ray_edge.py does the same between actors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Edge(Protocol):
    """The sending end. One thread at a time."""

    def send(self, message: bytes) -> None:
        """Hand the message over, after all those sent before. Blocks while the peer is behind by its bound.

        Raises PipelineError if the peer is gone; the message may then be lost.
        """

    def close(self) -> None:
        """No more messages; nothing is promised of those on the way."""


class LocalEdge:
    """To a peer in the same process, by a call."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver

    def send(self, message: bytes) -> None:
        self._deliver(message)

    def close(self) -> None:
        pass
