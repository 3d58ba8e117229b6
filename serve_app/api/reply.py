"""One answer as HTTP: a JSON body, or a stream of server-sent events.

Chunks of a stream are joined from strings that were made ready once per request: per piece of text there is one JSON
string to write and nothing to build.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.api.answer import Answer, End
from serve_app.api.connection import ClientGoneError, while_connected
from serve_app.api.problems import problem_of, unpadded
from shard_tools.cid import Cid, Codec

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """How one endpoint writes an answer. What differs between chat and completions, and nothing else."""

    kind: str  # `object` of a whole answer
    chunk_kind: str  # `object` of a chunk
    choice: Callable[[str, str | None], dict[str, Any]]  # text, finish_reason -> the one choice of a whole answer
    opening: str | None  # choice of the first chunk, as JSON
    before_text: str  # choice of a chunk with text, up to the JSON string ...
    after_text: str  # ... and after it
    closing: Callable[[str], str]  # finish_reason -> choice of the last chunk, as JSON


@dataclass(frozen=True, slots=True)
class Labels:
    """What every chunk of one answer repeats."""

    id: str
    created_s: int
    model: str


async def reply(
    request: Request, answer: Answer, shape: Shape, labels: Labels, *, stream: bool, with_usage: bool
) -> Response:
    """The response for `answer`, which is started here and closed whatever happens.

    Raises what refuses or breaks the request before the first byte is sent, and ClientGoneError; later errors become
    an event.
    """
    try:
        if stream:
            await while_connected(request.receive, answer.start())
            return EventStream(answer, shape, labels, with_usage)
        text = await while_connected(request.receive, _whole_text(answer))
        await answer.close()
    except BaseException:
        await answer.close()
        raise
    end = answer.end
    body = {
        **_head(shape.kind, labels),
        "choices": [shape.choice(text, end.reason)],
        "usage": _usage(answer, end),
        "llmd": _proof(labels, end),
    }
    return JSONResponse(body, headers={"x-llmd-receipt": str(Cid.of(Codec.DAG_CBOR, end.receipt))})


class EventStream(StreamingResponse):
    """Server-sent events of a started answer; when the client leaves, the answer is cancelled."""

    def __init__(self, answer: Answer, shape: Shape, labels: Labels, with_usage: bool) -> None:
        self._answer = answer
        super().__init__(_events(answer, shape, labels, with_usage), 200, STREAM_HEADERS, "text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        except (ClientGoneError, OSError):  # OSError: how ASGI servers report a write to a closed connection
            pass
        finally:
            await self._answer.close()


async def _whole_text(answer: Answer) -> str:
    await answer.start()
    return "".join([piece async for piece in answer.pieces()])


async def _events(answer: Answer, shape: Shape, labels: Labels, with_usage: bool) -> AsyncIterator[bytes]:
    head = json.dumps(_head(shape.chunk_kind, labels))[:-1]
    before = f'data: {head}, "choices": ['
    after = f'], "usage": null}}{_END}' if with_usage else f"]}}{_END}"
    text_before, text_after = before + shape.before_text, shape.after_text + after
    try:
        if shape.opening is not None:
            yield f"{before}{shape.opening}{after}".encode()
        async for piece in answer.pieces():
            yield f"{text_before}{json.dumps(piece)}{text_after}".encode()
        end = answer.end
        # The proof rides on the chunk that ends the choice: many clients read choices[0] of every chunk, and would
        # fall over an extra chunk without choices that they did not ask for.
        proof = json.dumps(_proof(labels, end))
        yield f'{before}{shape.closing(end.reason)}], "llmd": {proof}{after[1:]}'.encode()
        if with_usage:
            yield f'{before}], "usage": {json.dumps(_usage(answer, end))}}}{_END}'.encode()
    except Exception as e:  # too late for a status: every error becomes an event, and the stream still ends properly
        yield f"data: {json.dumps(problem_of(e).body())}{_END}".encode()
    yield DONE


_END = "\n\n"


def _head(kind: str, labels: Labels) -> dict[str, Any]:
    return {"id": labels.id, "object": kind, "created": labels.created_s, "model": labels.model}


def _usage(answer: Answer, end: End) -> Mapping[str, int]:
    prompt = len(answer.request.prompt_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": end.completion_tokens,
        "total_tokens": prompt + end.completion_tokens,
    }


def _proof(labels: Labels, end: End) -> Mapping[str, str]:
    """Our own part of an answer. receipt: the bundle in base64url without padding."""
    return {"request_id": labels.id, "receipt": unpadded(end.receipt)}
