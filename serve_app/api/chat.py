"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response

from serve_app.api.admission import LEVEL_HEADER, admitted, find_model, tokenised
from serve_app.api.answer import Answer
from serve_app.api.connection import read_body
from serve_app.api.generator import Generator, ServedModel
from serve_app.api.idempotency import once_of
from serve_app.api.reply import Labels, Shape, reply
from serve_app.api.wire import ChatBody, parse


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}  # OpenAI's own schema requires the null keys
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}


def _closing(reason: str) -> str:
    return json.dumps({"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason})


SHAPE = Shape(
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    choice=_choice,
    opening='{"index": 0, "delta": {"role": "assistant", "content": "", "refusal": null}, '
    '"logprobs": null, "finish_reason": null}',
    before_text='{"index": 0, "delta": {"content": ',
    after_text='}, "logprobs": null, "finish_reason": null}',
    closing=_closing,
)


async def chat(
    request: Request, models: Mapping[str, ServedModel], generator: Generator, max_body_bytes: int
) -> Response:
    """Answer a conversation. Raises what problems.py turns into an HTTP error."""
    raw, came_s = await read_body(request, max_body_bytes), time.monotonic()
    body = parse(raw, ChatBody)
    once = once_of(request.headers, body)
    model = find_model(models, body.model)
    turns = [message.for_template() for message in body.messages]
    chars = sum(len(turn["content"]) for turn in turns)
    ids = await tokenised(chars, lambda: model.text.encode_chat(turns))
    asked = admitted(
        body,
        model,
        ids,
        param="messages",
        prefix="chatcmpl",
        default_tokens=None,
        came_s=came_s,
        once=once,
        level=request.headers.get(LEVEL_HEADER),
    )
    answer = Answer(generator, asked, model.text.decoder(), body.stops())
    labels = Labels(asked.id, int(time.time()), model.name)
    return await reply(request, answer, SHAPE, labels, stream=body.stream, with_usage=body.wants_usage())
