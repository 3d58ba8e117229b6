"""A generator without a model: it says the prompt back. For tests of everything above the seam, and to try a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from serve_app.errors import OverloadedError
from serve_app.messages.request import Event, FinishedEvent, FinishReason, GenerationRequest, RequestId, TokensEvent
from shard_tools import canonical
from shard_tools.canonical import Value


class EchoGenerator:
    """Answers with the prompt's own tokens, then stops. The same request always gets the same events.

    pace_s: time between events; tokens_per_event: how many tokens each carries; max_running: beyond it requests are
    refused. Its receipts say how many tokens were generated and prove nothing.
    """

    def __init__(self, *, pace_s: float = 0.0, tokens_per_event: int = 1, max_running: int = 256) -> None:
        self.pace_s, self.tokens_per_event, self.max_running = pace_s, tokens_per_event, max_running
        self.served = 0  # requests that ended by themselves
        self.cancelled = 0
        self._running: dict[RequestId, asyncio.Event] = {}  # set: asked to stop

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The prompt back, up to max_tokens or its first stop id."""
        if len(self._running) >= self.max_running:
            raise OverloadedError(f"{self.max_running} requests are running already; try again shortly")
        answer, reason = _answer(request)
        stopped = self._running[request.id] = asyncio.Event()
        said = 0
        ended = False
        try:
            while said < len(answer) and not stopped.is_set():
                await asyncio.sleep(self.pace_s)
                tokens = answer[said : said + self.tokens_per_event]
                said += len(tokens)
                yield TokensEvent(request.id, tokens)
            ended = True
            receipt = canonical.encode({"echo": request.id, "tokens": said})
            yield FinishedEvent(request.id, "stop" if stopped.is_set() else reason, receipt)
        finally:
            del self._running[request.id]
            self.served += ended
            self.cancelled += not ended

    async def stop(self, id: RequestId) -> None:
        """See Generator.stop."""
        if id in self._running:
            self._running[id].set()

    def status(self) -> dict[str, Value]:
        """See Generator.status."""
        return {
            "generator": "echo",
            "running": len(self._running),
            "served": self.served,
            "cancelled": self.cancelled,
        }

    async def ready(self) -> bool:
        """Always: there is nothing to load."""
        return True


def _answer(request: GenerationRequest) -> tuple[tuple[int, ...], FinishReason]:
    ids = request.prompt_ids
    end = next((at + 1 for at, id in enumerate(ids) if id in request.stop_ids), len(ids))
    return ids[: min(end, request.max_tokens)], "stop" if end <= request.max_tokens else "length"
