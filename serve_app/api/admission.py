"""From a parsed body and its prompt's ids to the request that the pipeline sees: the last place that knows the body."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from serve_app.api.generator import ServedModel
from serve_app.api.wire import ChatBody, CompletionBody
from serve_app.errors import ContextLengthError, DeadlineError, RequestError, UnknownModelError
from serve_app.messages.request import GenerationRequest, Once, RequestId, fresh_salt

T = TypeVar("T")
LEVEL_HEADER = "x-llmd-assurance"

LONG_CHARS = 16 << 10  # tokenising this much takes a few ms; more would hold up every other stream's tokens


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model of that name. Raises UnknownModelError."""
    if name not in models:
        raise UnknownModelError(name, tuple(models))
    return models[name]


async def tokenised(chars: int, encode: Callable[[], T]) -> T:
    """What `encode` returns, computed beside the event loop when the text is long."""
    return await asyncio.to_thread(encode) if chars > LONG_CHARS else encode()


def admitted(
    body: ChatBody | CompletionBody,
    model: ServedModel,
    prompt_ids: tuple[int, ...],
    *,
    param: str,
    prefix: str,
    default_tokens: int | None,
    came_s: float,
    once: Once | None,
    level: str | None,
) -> GenerationRequest:
    """The request for the pipeline. param: the field that holds the prompt; prefix: of the id ("chatcmpl").

    default_tokens: the completion's longest length when the client names none; None: what the context leaves.
    came_s: on the monotonic clock, when the body was there; its time runs from then. once: what shows a retry.
    level: what the header names. Raises ContextLengthError when prompt and completion do not fit, RequestError for an
    id outside the vocabulary, DeadlineError when tokenising took all its time.
    """
    if not prompt_ids:
        raise RequestError("The prompt has no tokens; send some text.", param)
    vocab = model.text.vocab_size
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab:
        raise RequestError(f"The prompt holds token ids outside [0, {vocab}), this model's vocabulary.", param)
    left = model.context_length - len(prompt_ids)
    asked = body.asked_tokens()
    wanted = asked or max(1, left if default_tokens is None else min(default_tokens, left))
    if wanted > left:
        error = ContextLengthError(model.context_length, len(prompt_ids), wanted)
        error.param = param
        raise error
    timeout_ms = body.timeout_ms()
    if timeout_ms is not None:
        timeout_ms -= int((time.monotonic() - came_s) * 1000)
        if timeout_ms <= 0:
            raise DeadlineError
    return GenerationRequest(
        id=RequestId(f"{prefix}-{secrets.token_hex(16)}"),
        manifest=model.manifest,
        prompt_ids=prompt_ids,
        max_tokens=wanted,
        sampling=body.sampling(),
        stop_ids=tuple(sorted(set(model.text.stop_ids))),
        client_nonce=body.nonce(),
        salt=fresh_salt(),
        priority=body.priority(),
        cache_salt=body.cache_salt(),
        timeout_ms=timeout_ms,
        once=once,
        assurance=body.assurance(level),
    )
