"""One running request, as text: ids are decoded, stop strings end it, slow readers hold nobody up.

A task of its own reads the generator as fast as it speaks. What the client has not taken yet is joined into one piece,
so memory per request is bounded by the text of max_tokens tokens, and a slow client holds text, never KV pages.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.api.generator import Generator, IncrementalDecoder
from serve_app.api.stop_strings import StopScanner
from serve_app.errors import (
    DeadlineError,
    KeyReusedError,
    MismatchError,
    OverloadedError,
    PipelineError,
    RequestError,
    TakenOverError,
)
from serve_app.messages.request import FailedEvent, FinishedEvent, GenerationRequest, TokensEvent
from shard_tools.errors import LlmdError


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended."""

    reason: Literal["stop", "length"]
    completion_tokens: int  # generated, those of a stop string included: as many as the receipt covers
    receipt: bytes


class Answer:
    """The text of one request. `start`, then `pieces`, then `end`; `close` always."""

    def __init__(
        self, generator: Generator, request: GenerationRequest, decoder: IncrementalDecoder, stops: Sequence[str]
    ) -> None:
        self.request = request
        self._generator = generator
        self._decoder = decoder
        self._scanner = StopScanner(stops)
        self._untaken: list[str] = []
        self._changed = asyncio.Event()
        self._tokens = 0
        self._begun = False
        self._end: End | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The request was admitted and has begun. Raises what refused it, before a byte is sent to the client."""
        self._pump = asyncio.create_task(self._read())
        self._pump.add_done_callback(lambda _: self._changed.set())
        while not (self._begun or self._pump.done()):
            await self._wait()
        if not self._begun:
            self._pump.result()

    async def pieces(self) -> AsyncIterator[str]:
        """The text, in pieces as large as what came since the last one was taken. Raises what broke the request."""
        pump = self._pump
        assert pump is not None, "start() comes first"
        while True:
            done = pump.done()  # before the last look: what the task leaves behind it is still taken
            if self._untaken:
                piece = "".join(self._untaken)
                self._untaken.clear()
                yield piece
            elif done:
                break
            else:
                await self._wait()
        pump.result()

    @property
    def end(self) -> End:
        """How it ended, once `pieces` has."""
        assert self._end is not None, "pieces() comes first"
        return self._end

    async def close(self) -> None:
        """The request runs no longer: cancelled, if it had not ended."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})
            if not self._pump.cancelled():
                self._pump.exception()  # seen: asyncio would log one that nobody asked for

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _read(self) -> None:
        timeout_ms = self.request.timeout_ms
        try:
            async with asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000) as limit:
                await self._read_events()
        except TimeoutError as e:
            if not limit.expired():
                raise
            raise DeadlineError from e

    async def _read_events(self) -> None:
        events = self._generator.generate(self.request)
        try:
            async for event in events:
                if isinstance(event, TokensEvent):
                    await self._tokens_came(event)
                elif isinstance(event, FinishedEvent):
                    self._finished(event)
                else:
                    raise _as_error(event)
        finally:
            await events.aclose()
        if self._end is None:
            raise PipelineError("the pipeline left this request without an end; send it again")

    async def _tokens_came(self, event: TokensEvent) -> None:
        self._tokens += len(event.tokens)
        stopped = self._scanner.matched
        self._put(self._scanner.push(self._decoder.push(event.tokens)))
        self._begun = True
        self._changed.set()
        if self._scanner.matched and not stopped:
            await self._generator.stop(self.request.id)

    def _finished(self, event: FinishedEvent) -> None:
        self._put(self._scanner.push(self._decoder.finish()) + self._scanner.finish())
        if self._scanner.matched:
            reason: Literal["stop", "length"] = "stop"
        elif event.reason == "stop" or event.reason == "length":
            reason = event.reason
        else:
            raise PipelineError(f"the pipeline ended this request early ({event.reason}); send it again")
        self._end = End(reason, self._tokens, event.receipt)
        self._begun = True

    def _put(self, piece: str) -> None:
        if piece:
            self._untaken.append(piece)


def _as_error(event: FailedEvent) -> LlmdError:
    match event.kind:
        case "request":
            return RequestError(event.message)
        case "key_reused":
            return KeyReusedError()
        case "taken_over":
            return TakenOverError()
        case "overloaded":
            return OverloadedError(event.message)
        case "deadline":
            return DeadlineError()
        case "pipeline" | "lost":
            return PipelineError(event.message)
        case "integrity":
            return MismatchError(event.message, event.evidence)
