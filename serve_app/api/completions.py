"""POST /v1/completions: text or token ids continued, no chat template."""

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
from serve_app.api.wire import CompletionBody, parse

DEFAULT_TOKENS = 16  # OpenAI's documented default for this endpoint; chat has none


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


SHAPE = Shape(
    kind="text_completion",
    chunk_kind="text_completion",
    choice=_choice,
    opening=None,
    before_text='{"index": 0, "text": ',
    after_text=', "logprobs": null, "finish_reason": null}',
    closing=lambda reason: json.dumps(_choice("", reason)),
)


async def complete(
    request: Request, models: Mapping[str, ServedModel], generator: Generator, max_body_bytes: int
) -> Response:
    """Continue a prompt. Raises what problems.py turns into an HTTP error."""
    raw, came_s = await read_body(request, max_body_bytes), time.monotonic()
    body = parse(raw, CompletionBody)
    once = once_of(request.headers, body)
    model = find_model(models, body.model)
    prompt = body.one_prompt()
    if isinstance(prompt, str):
        text = prompt
        ids = await tokenised(len(text), lambda: model.text.encode(text, True))
    else:
        ids = tuple(prompt)
    asked = admitted(
        body,
        model,
        ids,
        param="prompt",
        prefix="cmpl",
        default_tokens=DEFAULT_TOKENS,
        came_s=came_s,
        once=once,
        level=request.headers.get(LEVEL_HEADER),
    )
    answer = Answer(generator, asked, model.text.decoder(), body.stops())
    labels = Labels(asked.id, int(time.time()), model.name)
    return await reply(request, answer, SHAPE, labels, stream=body.stream, with_usage=body.wants_usage())
