"""The ingress's side of a Head: implements api/generator.py's Generator over one link, and keeps that link alive.

While there is no link, requests are refused with a PipelineError; those on the way when it broke end with one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

from serve_app.errors import OverloadedError, PipelineError
from serve_app.messages.events import AskStatus, Call, Stop, Submit, decode_events, encode_call
from serve_app.messages.request import Event, FailedEvent, FinishedEvent, GenerationRequest, RequestId
from serve_app.transport.link import Link, LinkAddress, connect
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)
_RETRY_S = 0.5
_STATUS_EVERY_S = 1.0
_MAX_FRAME_BYTES = 64 << 20

Locate = Callable[[], Awaitable[LinkAddress]]


class HeadClient:
    """Requests to one pipeline, wherever its Head is now."""

    def __init__(self, locate: Locate) -> None:
        """locate: where the Head listens now; asked again whenever the link broke. May raise PipelineError."""
        self._locate = locate
        self._link: Link | None = None
        self._events: dict[RequestId, asyncio.Queue[Event]] = {}
        self._facts: dict[str, Value] = {}
        self._why_not = "the pipeline is still starting"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and stay connected, in the background of the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def close(self) -> None:
        """Let go of the Head; requests on the way end with an error."""
        if self._task is not None:
            self._task.cancel()
        self._lose("this ingress is shutting down")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the generator early cancels it.

        Raises OverloadedError when the pipeline has no room, PipelineError when there is none.
        """
        if self._link is None:
            raise PipelineError(f"no pipeline is ready: {self._why_not}")
        queue: asyncio.Queue[Event] = asyncio.Queue()  # max_tokens bounds it: at most one event a token
        self._events[request.id] = queue
        self._say(Submit(request))
        ended = False
        try:
            while not ended:
                event = await queue.get()
                ended = isinstance(event, FinishedEvent | FailedEvent)
                if isinstance(event, FailedEvent) and event.kind == "overloaded":
                    raise OverloadedError(event.message)
                yield event
        finally:
            self._events.pop(request.id, None)
            if not ended:
                self._say(Stop(request.id, keep=False))

    async def stop(self, id: RequestId) -> None:
        """End the request and keep its tokens so far."""
        self._say(Stop(id, keep=True))

    def status(self) -> dict[str, Value]:
        """What the Head last said of its pipeline."""
        if self._link is None:
            return {"pipelines": [], "problem": self._why_not}
        return self._facts

    async def ready(self) -> bool:
        """Whether the Head is linked and says that its pipeline has generated a token and works."""
        return self._link is not None and self._facts.get("ready") is True

    def _say(self, call: Call) -> None:
        if self._link is not None:
            self._link.send(encode_call(call))

    async def _stay_connected(self) -> None:
        while True:
            try:
                link = await connect(await self._locate(), _MAX_FRAME_BYTES)
            except LlmdError as e:
                self._why_not = str(e)
                await asyncio.sleep(_RETRY_S)
                continue
            self._link = link
            asking = asyncio.create_task(self._ask_status())
            try:
                await self._listen(link)
            except LlmdError as e:
                _log.warning("the head's link broke: %s", e)
            finally:
                asking.cancel()
                link.close()
                self._lose("the connection to the pipeline's head was lost")

    async def _listen(self, link: Link) -> None:
        while (frame := await link.receive()) is not None:
            events, status = decode_events(frame)
            if status is not None:
                self._facts = status.facts
            for event in events:
                queue = self._events.get(event.id)
                if queue is not None:  # else the client is gone and the Head has been told
                    queue.put_nowait(event)

    async def _ask_status(self) -> None:
        while True:
            self._say(AskStatus())
            await asyncio.sleep(_STATUS_EVERY_S)

    def _lose(self, why: str) -> None:
        self._link, self._facts, self._why_not = None, {}, why
        for id, queue in self._events.items():
            queue.put_nowait(FailedEvent(id, "pipeline", why))
