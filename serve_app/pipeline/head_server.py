"""Lets ingresses of other processes use a Head: one link each, one message a step for all of its requests.

When a link ends, its requests are cancelled: nobody is left to read their tokens. Those with an Idempotency-Key run on
for a while, for whoever asks again (keyed.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from serve_app.errors import (
    KeyReusedError,
    OverloadedError,
    PipelineError,
    ProtocolError,
    RequestError,
    TakenOverError,
)
from serve_app.messages.events import (
    MAX_MESSAGE_BYTES,
    AskStatus,
    Call,
    Held,
    Seek,
    Status,
    Stop,
    Submit,
    Told,
    decode_call,
    encode_events,
)
from serve_app.messages.request import FailedEvent, FinishedEvent, RequestId
from serve_app.pipeline.head import Head
from serve_app.pipeline.keyed import KEEP_S, KeyedRequests
from serve_app.transport.link import SECRET_BYTES, Link, LinkAddress, accept
from shard_tools.canonical import Value

LOOPBACK = "127.0.0.1"
_log = logging.getLogger(__name__)


class HeadServer:
    """Listens for ingresses on one address with a secret of its own."""

    def __init__(self, head: Head, facts: Callable[[], dict[str, Value]], keep_s: float = KEEP_S) -> None:
        """facts: what a status call is answered with. keep_s: how long a request with a key waits for a retry."""
        self._requests, self._facts = KeyedRequests(head, keep_s), facts
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._servers: list[asyncio.Server] = []
        self._links: set[Link] = set()
        self._closed = False

    async def listen(self, host: str) -> LinkAddress:
        """Begin to listen on one free port of this host's address and of loopback, for ingresses beside us."""
        local = await asyncio.start_server(self._serve, LOOPBACK, 0)
        port: int = local.sockets[0].getsockname()[1]
        self._servers.append(local)
        if host != LOOPBACK:
            self._servers.append(await asyncio.start_server(self._serve, host, port))
        return LinkAddress(host, port, self._secret)

    def close(self) -> None:
        """Cut every link and stop listening."""
        self._closed = True
        for server in self._servers:
            server.close()
        for link in list(self._links):
            link.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = await accept(reader, writer, self._secret, MAX_MESSAGE_BYTES)
        if link is None:
            return
        if self._closed:  # while it proved itself
            link.close()
            return
        caller = _Caller(self._requests, link, self._facts)
        self._links.add(link)
        try:
            while (frame := await link.receive()) is not None:
                caller.take(decode_call(frame))
        except ProtocolError as e:
            _log.warning("an ingress was cut off: %s", e)
        finally:
            self._links.discard(link)
            link.close()
            caller.gone()


class _Caller:
    """One ingress: its requests, and the events that wait for the end of this turn of the loop."""

    def __init__(self, all: KeyedRequests, link: Link, facts: Callable[[], dict[str, Value]]) -> None:
        self._all, self._link, self._facts = all, link, facts
        self._requests: set[RequestId] = set()
        self._events: list[Told] = []

    def take(self, call: Call) -> None:
        match call:
            case Submit(request, begun):
                if request.id in self._requests:
                    # A refusal under this id would end the one that runs, for its reader.
                    raise ProtocolError(f"request {request.id} was submitted twice")
                self._requests.add(request.id)  # before: submit may tell of its end at once
                try:
                    self._all.submit(request, self._tell, begun)
                except KeyReusedError as e:
                    self._tell(FailedEvent(request.id, "key_reused", str(e)))
                except TakenOverError as e:
                    self._tell(FailedEvent(request.id, "taken_over", str(e)))
                except RequestError as e:
                    self._tell(FailedEvent(request.id, "request", str(e)))
                except OverloadedError as e:
                    self._tell(FailedEvent(request.id, "overloaded", str(e)))
                except PipelineError as e:
                    self._tell(FailedEvent(request.id, "lost", str(e)))
            case Stop(id, keep):
                if id in self._requests:  # never another ingress's
                    if not keep:
                        self._requests.discard(id)  # it may go on for a reader of another link
                    self._all.stop(id, keep=keep)
            case AskStatus():
                self._link.send(encode_events([], Status(self._facts())))
            case Seek(key):
                self._tell(Held(key, self._all.holds(key)))

    def gone(self) -> None:
        for id in list(self._requests):
            self._all.stop(id, keep=False)

    def _tell(self, event: Told) -> None:
        if isinstance(event, FinishedEvent | FailedEvent):
            self._requests.discard(event.id)
        if not self._events:
            # Sent when this turn of the loop ends: what one step gave goes out as one message.
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._link.send(encode_events(events))
