"""The edge of plain Ray actor calls: the first implementation, the fallback, and the reference in tests.

Ray may run two calls of one caller out of order (a large argument travels by the object store, a small one
does not), so messages are numbered here and put back in order by `InOrder` on the other side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.errors import PipelineError, ProtocolError

_MAX_UNACKNOWLEDGED = 64  # messages; several times the steps a Head keeps in flight
_STALL_S = 30.0  # a peer that takes in nothing for so long is gone: its inbox is 64 messages deep


class RayEdge:
    """Sends to `actor.push(edge, number, message)`. Implements transport/edge.py's Edge."""

    def __init__(self, actor: Any, name: str) -> None:
        """name: tells the peer's senders apart."""
        self._actor, self._name = actor, name
        self._sent = 0
        self._pending: deque[Any] = deque()

    def send(self, message: bytes) -> None:
        try:
            self._reap(0.0)
            if len(self._pending) >= _MAX_UNACKNOWLEDGED:
                self._reap(_STALL_S)
            if len(self._pending) >= _MAX_UNACKNOWLEDGED:
                raise PipelineError(f"the peer of edge {self._name} has taken in nothing for {_STALL_S:.0f} s")
            self._pending.append(self._actor.push.remote(self._name, self._sent, message))
        except RayError as e:
            raise PipelineError(f"the peer of edge {self._name} is gone: {str(e).splitlines()[0]}") from e
        self._sent += 1

    def close(self) -> None:
        self._pending.clear()

    def _reap(self, timeout_s: float) -> None:
        """Forget calls that have been taken in; raise what any of them raised."""
        while self._pending:
            done, _ = ray.wait([self._pending[0]], timeout=timeout_s)
            if not done:
                return
            ray.get(self._pending.popleft())
            timeout_s = 0.0


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
