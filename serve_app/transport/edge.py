"""The seam between neighbours: a way to hand one message to a peer, in order.

The receiving side is a function that takes bytes; how they get there is the edge's business. An edge of plain
calls in one process ships here and is the reference; shared_memory.py and tcp.py go between processes,
cluster/ray_edge.py between actors.

A message may come in two parts, what it says and the rows it speaks of, which an edge joins on its way: so rows need
not be copied to be sent. An edge between two GPUs would take rows where they lie, in another type, and hand them to its
receiver beside the message; whoever makes the engines chooses the edge, and nobody between looks into rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Rows = bytes | memoryview  # C-contiguous, on the host; an edge between devices would widen this
Deliver = Callable[[bytes], None]  # takes one message in; may block, and then the sender waits
# (peer, why): called once, when the other end is gone; from any thread, but never from inside a send
Lost = Callable[[str, str], None]


class Edge(Protocol):
    """The sending end. One thread at a time."""

    def send(self, message: bytes, rows: Rows = b"") -> None:
        """Hand message and rows over as one message, after all those sent before.

        Blocks while the peer is behind by its bound. The buffers are the caller's again when this returns.
        Raises PipelineError if the peer is gone, also while it blocks; the message may then be lost.
        """

    def close(self) -> None:
        """No more messages; nothing is promised of those on the way. Any thread; does not block."""


class LocalEdge:
    """To a peer in the same process, by a call."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def send(self, message: bytes, rows: Rows = b"") -> None:
        self._deliver(b"".join((message, rows)))

    def close(self) -> None:
        pass
