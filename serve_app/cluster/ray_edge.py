"""The edge of plain Ray actor calls: the first implementation, the fallback, and the reference in tests.

Ray may run two calls of one caller out of order (a large argument travels by the object store, a small one
does not), so messages are numbered here and put back in order by `InOrder` on the other side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from serve_app.errors import PipelineError, ProtocolError
from serve_app.transport.edge import Rows

_MAX_UNACKNOWLEDGED = 64  # messages; several times the steps a Head keeps in flight
_STALL_S = 30.0  # a peer that takes in nothing for so long is gone: its inbox is 64 messages deep


class RayEdge:
    """Sends to `actor.push(edge, number, message)`. Implements transport/edge.py's Edge."""

    def __init__(self, actor: Any, name: str) -> None:
        """name: tells the peer's senders apart."""
        self._actor, self._name = actor, name
        self._sent = 0
        self._unacknowledged = 0
        self._failure: str | None = None
        self._changed = threading.Condition()

    def send(self, message: bytes, rows: Rows = b"") -> None:
        with self._changed:
            if not self._changed.wait_for(self._has_room, _STALL_S):
                raise PipelineError(f"the peer of edge {self._name} has taken in nothing for {_STALL_S:.0f} s")
            if self._failure is not None:
                raise PipelineError(f"the peer of edge {self._name} is gone: {self._failure}")
            number, self._sent = self._sent, self._sent + 1
            self._unacknowledged += 1
        taken = self._actor.push.remote(self._name, number, b"".join((message, rows)))
        # A callback, not ray.get: the Head sends from its event loop, and a dead peer must show at once.
        taken.future().add_done_callback(self._acknowledge)

    def close(self) -> None:
        with self._changed:
            self._failure = self._failure or "this end was closed"
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._failure is not None or self._unacknowledged < _MAX_UNACKNOWLEDGED

    def _acknowledge(self, taken: Future[None]) -> None:
        error = taken.exception()
        with self._changed:
            self._unacknowledged -= 1
            if error is not None and self._failure is None:
                self._failure = str(error).splitlines()[0]
            self._changed.notify_all()


class InOrder:
    """Hands messages of one sender on in the order of their numbers."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver
        self._next = 0
        self._early: dict[int, bytes] = {}

    def take(self, number: int, message: bytes) -> None:
        """Raises ProtocolError for a number that was there already or is too far ahead."""
        if not self._next <= number <= self._next + 2 * _MAX_UNACKNOWLEDGED:
            raise ProtocolError(f"message {number} where {self._next} comes next")
        self._early[number] = message
        while self._next in self._early:
            self._deliver(self._early.pop(self._next))
            self._next += 1
