"""Requests with an Idempotency-Key: who asks again goes on with the one that runs, or gets what it came to.

Stands between a Head and those who read its events. A request under a key outlives its reader: it runs on for a while,
and its answer is kept for a while. The same request under the same key then gets every token so far and the rest, and
its tokens are drawn once. The newest reader counts: a stopped ingress, or a connection that is dead without saying so,
cannot be told from one that lives, so whoever asks again takes the request over. Knows neither HTTP nor sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from serve_app.errors import KeyReusedError, TakenOverError
from serve_app.messages.events import Accepted, Begun
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    Once,
    RequestId,
    TokensEvent,
)
from serve_app.pipeline.head import Head
from shard_tools.errors import LlmdError

KEEP_S = 30.0  # a client that lost its connection asks again within seconds; until then pages are held for it
MAX_UNREAD = 64  # requests that run on without a reader; beyond it the one that lost its reader first is cancelled
MAX_KEPT_BYTES = 64 << 20  # of answers; beyond it the oldest go
_TOKEN_BYTES = 40  # of a Python integer in a list

Tell = Callable[[Event | Accepted], None]


@dataclass(slots=True)
class _Keyed:
    """One request under a key."""

    once: Once
    id: RequestId  # as the Head knows it
    reader: RequestId  # as whoever reads it does, or did last
    tell: Tell | None  # None: nobody reads it
    tokens: list[int] = field(default_factory=list)
    node_nonce: bytes = b""
    end: FinishedEvent | None = None
    timer: asyncio.TimerHandle | None = None  # until it is forgotten

    @property
    def size_bytes(self) -> int:
        return _TOKEN_BYTES * len(self.tokens) + (len(self.end.receipt) if self.end else 0)


class KeyedRequests:
    """A Head's requests, those without a key passed through. Used in the Head's event loop."""

    def __init__(self, head: Head, keep_s: float = KEEP_S) -> None:
        """keep_s: how long a request runs on without a reader, and how long an answer is kept."""
        self._head, self._keep_s = head, keep_s
        self._by_key: dict[bytes, _Keyed] = {}
        self._read: dict[RequestId, _Keyed] = {}  # by the reader's name for it
        self._unread: dict[RequestId, _Keyed] = {}  # in the order in which they lost their reader
        self._answers: dict[RequestId, _Keyed] = {}  # in the order in which they ended
        self._answers_bytes = 0

    def submit(self, request: GenerationRequest, tell: Tell, begun: Begun | None = None) -> None:
        """Take the request in, or go on with the one of its key; tell begins with Accepted.

        Raises what Head.submit raises, KeyReusedError where the key is another request's, TakenOverError for a request
        begun elsewhere whose key runs here without it.
        """
        once = request.once
        if once is None:
            tell(Accepted(request.id, self._head.submit(request, tell, begun)))
            return
        keyed = self._by_key.get(once.key)
        if keyed is None:
            self._begin(once, request, tell, begun)
        elif keyed.once.asked != once.asked:
            raise KeyReusedError
        else:
            self._go_on(keyed, request, tell, begun)

    def holds(self, key: bytes) -> bool:
        """Whether a request under this key runs here, or its answer is kept."""
        return key in self._by_key

    def stop(self, id: RequestId, *, keep: bool) -> None:
        """keep: end the request now, what it drew so far counts. Else its reader is gone: without a key it ends too."""
        keyed = self._read.get(id)
        if keyed is None:
            self._head.stop(id, keep=keep)
        elif keep:
            self._head.stop(keyed.id, keep=True)
        else:
            self._part(keyed)
            self._unread[keyed.id] = keyed
            self._forget_later(keyed)
            if len(self._unread) > MAX_UNREAD:
                self._forget(next(iter(self._unread.values())))

    def _begin(self, once: Once, request: GenerationRequest, tell: Tell, begun: Begun | None) -> None:
        drawn = [] if begun is None else list(begun.drawn)
        keyed = self._by_key[once.key] = _Keyed(once, request.id, request.id, tell, drawn)
        self._read[request.id] = keyed
        try:
            keyed.node_nonce = self._head.submit(request, lambda event: self._hear(keyed, event), begun)
        except LlmdError:
            self._part(keyed)
            self._forget(keyed)
            raise
        tell(Accepted(request.id, keyed.node_nonce))

    def _go_on(self, keyed: _Keyed, request: GenerationRequest, tell: Tell, begun: Begun | None) -> None:
        known = () if begun is None else begun.drawn  # to its reader
        if begun is not None and (begun.node_nonce, known) != (keyed.node_nonce, tuple(keyed.tokens[: len(known)])):
            raise TakenOverError  # it began anew here, with other noise, while that ingress had not come yet
        if keyed.tell is not None:
            keyed.tell(FailedEvent(keyed.reader, "taken_over", str(TakenOverError())))
            self._part(keyed)
        tell(Accepted(request.id, keyed.node_nonce))
        if len(keyed.tokens) > len(known):
            tell(TokensEvent(request.id, tuple(keyed.tokens[len(known) :])))
        if keyed.end is not None:
            tell(replace(keyed.end, id=request.id))
            return
        if keyed.timer is not None:
            keyed.timer.cancel()
        self._unread.pop(keyed.id, None)
        keyed.reader, keyed.tell = request.id, tell
        self._read[request.id] = keyed
        self._head.allow(keyed.id, request.timeout_ms)
        if begun is not None and begun.stopped:
            self._head.stop(keyed.id, keep=True)

    def _hear(self, keyed: _Keyed, event: Event) -> None:
        """What the Head tells of it."""
        tell = keyed.tell
        if isinstance(event, TokensEvent):
            keyed.tokens += event.tokens
        else:
            self._part(keyed)
            self._unread.pop(keyed.id, None)
            if isinstance(event, FinishedEvent) and event.reason != "cancelled":
                keyed.end = event
                self._keep(keyed)
            else:
                self._forget(keyed)  # a retry begins anew
        if tell is not None:
            tell(replace(event, id=keyed.reader))

    def _keep(self, keyed: _Keyed) -> None:
        if self._by_key.get(keyed.once.key) is not keyed:
            return  # forgotten while its stages signed
        self._answers[keyed.id] = keyed
        self._answers_bytes += keyed.size_bytes
        self._forget_later(keyed)
        while self._answers_bytes > MAX_KEPT_BYTES:
            self._forget(next(iter(self._answers.values())))

    def _part(self, keyed: _Keyed) -> None:
        """Nobody reads it."""
        keyed.tell = None
        self._read.pop(keyed.reader, None)

    def _forget_later(self, keyed: _Keyed) -> None:
        if keyed.timer is not None:
            keyed.timer.cancel()
        keyed.timer = asyncio.get_running_loop().call_later(self._keep_s, self._forget, keyed)

    def _forget(self, keyed: _Keyed) -> None:
        """Its key may be used anew; what still runs of it is cancelled."""
        if self._by_key.get(keyed.once.key) is keyed:
            del self._by_key[keyed.once.key]
        if keyed.timer is not None:
            keyed.timer.cancel()
        if self._answers.pop(keyed.id, None) is not None:
            self._answers_bytes -= keyed.size_bytes
        if self._unread.pop(keyed.id, None) is not None:
            self._head.stop(keyed.id, keep=False)
