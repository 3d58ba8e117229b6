"""The seam between HTTP and the engine: token ids go down, events come up.

Whatever generates tokens (a Head behind a socket, the house in one process, `api/echo.py`) is a Generator; whatever
turns text into ids is a Text. The files above them know neither sockets nor torch nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.messages.request import Event, GenerationRequest, RequestId
from shard_tools.canonical import Value
from shard_tools.cid import Cid
from shard_tools.manifest import ModelName


class Generator(Protocol):
    """Runs requests. Safe to use from many tasks of one event loop at a time."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request: TokensEvents, then exactly one FinishedEvent or FailedEvent, then the end.

        A stop id that ends the answer is the last token of the last TokensEvent. Raises OverloadedError before the
        first event when there is no room. Closing the iterator early, or cancelling the task that reads it, cancels
        the request and frees its pages.
        """
        ...

    async def stop(self, id: RequestId) -> None:
        """The request ends now and keeps its tokens so far; its FinishedEvent, with receipt, still follows.

        For a stop string found in the text. Nothing happens if the request has already ended.
        """
        ...

    def status(self) -> dict[str, Value]:
        """What GET /v1/cluster/state shows: the pipelines, their stages and their load, as of now."""
        ...

    async def ready(self) -> bool:
        """Whether the pipeline has generated a token since it was built and has not failed since."""
        ...


class IncrementalDecoder(Protocol):
    """Text of one answer as its tokens arrive. Law: push(a) + push(b) + ... + finish() == decode(a + b + ...)."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that can no longer change; bytes of an unfinished character are kept back."""
        ...

    def finish(self) -> str:
        """What was kept back; an unfinished character becomes U+FFFD."""
        ...


class Text(Protocol):
    """One model's tokenizer and chat template."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer (end of turn, end of text)."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt of a conversation, up to where the assistant's answer begins. Raises RequestError."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of a text. add_special_tokens: whether the model's opening token is put before it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        ...

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one answer."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as clients see it."""

    name: ModelName
    manifest: Cid
    context_length: int  # tokens, prompt and completion together
    created_s: int  # Unix time shown by /v1/models
    text: Text
