"""One streamed answer of an OpenAI-compatible server over plain HTTP/1.1, with the time of every piece.

Sockets and json alone: on a small machine the client shares cores with what it measures, and an HTTP library takes more
of them than parsing does. A connection per request, so that hanging up is closing it. `benchmarks.client_overhead`
measures what this file itself adds. Knows nothing of whom it asks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 << 10
MAX_EVENT_BYTES = 32 << 20  # a receipt of 16 MiB in base64
READ_BYTES = 64 << 10


class BadReplyError(Exception):
    """What the server sent is no answer of the kind that was asked for."""


@dataclass(slots=True)
class Reply:
    """What came, and when: seconds on time.perf_counter's clock."""

    sent_s: float
    status: int = 0
    piece_s: list[float] = field(default_factory=list)  # arrival of each piece of text
    text: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    receipt: str | None = None  # base64url, of our own server alone
    error: str | None = None
    hung_up: bool = False  # by us
    ended_s: float = 0.0


async def ask(
    url: str,
    path: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    hang_up_after: int | None = None,
    heard: Callable[[Reply], None] = lambda reply: None,
    timeout_s: float = 600.0,
) -> Reply:
    """The streamed answer to `body`. hang_up_after: close the connection after so many pieces of text.

    heard: called after every event, with what came so far.

    Never raises for what the server or the network does: `error` says what went wrong.
    """
    reply = Reply(time.perf_counter())
    try:
        async with asyncio.timeout(timeout_s):
            await _ask(reply, url, path, body, headers or {}, hang_up_after, heard)
    except TimeoutError:
        reply.error = f"no end after {timeout_s:.0f} s"
    except Exception as e:  # whatever a server sends or a network does is part of what was measured
        reply.error = f"{type(e).__name__}: {e}"
    reply.ended_s = time.perf_counter()
    return reply


async def _ask(
    reply: Reply,
    url: str,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    hang_up_after: int | None,
    heard: Callable[[Reply], None],
) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    if parts.scheme != "http":
        raise BadReplyError(f"{url} is not http://")
    data = json.dumps(body).encode()
    lines = {"Host": f"{host}:{port}", "Content-Type": "application/json", "Content-Length": str(len(data))}
    lines |= {"Connection": "close", "Accept": "text/event-stream", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_HEAD_BYTES)
    try:
        reply.sent_s = time.perf_counter()
        writer.write(f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        answer = await reader.readuntil(b"\r\n\r\n")
        reply.status = int(answer.split(b" ", 2)[1])
        pieces = _chunks(reader) if b"transfer-encoding: chunked" in answer.lower() else _until_eof(reader)
        if reply.status != 200:
            text = b"".join([piece async for piece, _ in pieces])
            raise BadReplyError(f"status {reply.status}: {text[:300].decode(errors='replace')}")
        async for event, at in _events(pieces):
            if event == b"[DONE]":
                return
            _take(reply, json.loads(event), at)
            heard(reply)
            if hang_up_after is not None and len(reply.piece_s) >= hang_up_after:
                reply.hung_up = True
                return
        raise BadReplyError("the stream ended without [DONE]")
    finally:
        writer.close()


def _take(reply: Reply, event: Any, at: float) -> None:
    if not isinstance(event, dict):
        raise BadReplyError(f"an event that is no object: {str(event)[:100]}")
    if event.get("error"):
        raise BadReplyError(str(event["error"])[:300])
    usage = event.get("usage")
    if usage:
        reply.prompt_tokens, reply.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    reply.receipt = (event.get("llmd") or {}).get("receipt", reply.receipt)
    for choice in event.get("choices", ()):
        delta = choice.get("delta")
        piece = choice.get("text") if delta is None else delta.get("content")
        if piece:
            reply.piece_s.append(at)
            reply.text += piece
        reply.finish = choice.get("finish_reason") or reply.finish


async def _events(pieces: AsyncIterator[tuple[bytes, float]]) -> AsyncIterator[tuple[bytes, float]]:
    """What stands after `data:`, and when its last byte came."""
    rest = b""
    async for piece, at in pieces:
        rest += piece.replace(b"\r\n", b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise BadReplyError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip(), at


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    """The pieces of a chunked body (RFC 9112, section 7.1), each with the moment it was whole."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        if size > MAX_EVENT_BYTES:
            raise BadReplyError(f"a chunk of {size} bytes")
        piece = (await reader.readexactly(size + 2))[:-2]
        yield piece, time.perf_counter()


async def _until_eof(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    while piece := await reader.read(READ_BYTES):
        yield piece, time.perf_counter()
