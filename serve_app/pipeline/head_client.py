"""The ingress's side of a Head: implements api/generator.py's Generator over one link, and keeps that link alive.

A request outlives its Head. What is needed to go on with it is held here, prompt and tokens so far, and submitted to
the Head that comes next; whoever reads its events sees a pause. Before the first Head requests are refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace

from serve_app.errors import DeadlineError, OverloadedError, PipelineError, ReplacedError
from serve_app.messages.events import (
    MAX_RESUMED,
    Accepted,
    AskStatus,
    Begun,
    Call,
    Stop,
    Submit,
    decode_events,
    encode_call,
)
from serve_app.messages.request import Event, FailedEvent, FinishedEvent, GenerationRequest, RequestId, TokensEvent
from serve_app.transport.link import Link, LinkAddress, connect
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)
_RETRY_S = 0.2
_LOCATE_S = 10.0  # for the Supervisor to say where; one that is being restarted takes some seconds
_STATUS_EVERY_S = 1.0
_MAX_FRAME_BYTES = 64 << 20
WAIT_S = 180.0  # for the next Head: as long as a Head waits for a stage, or a pipeline of some gigabytes to be built

Locate = Callable[[], Awaitable[LinkAddress]]


@dataclass(slots=True)
class _Asked:
    """A request on its way."""

    request: GenerationRequest
    began_s: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)  # max_tokens bounds it: one event a token
    drawn: list[int] = field(default_factory=list)
    nonce: bytes = b""  # of the Head that took it in first
    stopped: bool = False
    times: int = 0  # it was resumed
    wire_id: RequestId | None = None  # its id with the Head it is with: the last one may still run it under another
    ended: bool = False

    @property
    def left_ms(self) -> int | None:
        """What is left of its time; None where it has no deadline."""
        if self.request.timeout_ms is None:
            return None
        return self.request.timeout_ms - int((time.monotonic() - self.began_s) * 1000)

    def call(self) -> Submit:
        """What the next Head is told, while some of its time is left."""
        if not self.nonce:
            self.wire_id = self.request.id
            return Submit(replace(self.request, timeout_ms=self.left_ms))
        self.times += 1
        self.wire_id = RequestId(f"{self.request.id}~{self.times}")
        begun = Begun(tuple(self.drawn), self.stopped and bool(self.drawn), self.nonce, self.times)
        return Submit(replace(self.request, id=self.wire_id, timeout_ms=self.left_ms), begun)


class HeadClient:
    """Requests to one pipeline, wherever its Head is now."""

    def __init__(self, locate: Locate, wait_s: float = WAIT_S) -> None:
        """locate: where the Head listens now; asked again whenever the link broke. May raise PipelineError.

        wait_s: how long requests wait for the next Head.
        """
        self._locate, self._wait_s = locate, wait_s
        self._link: Link | None = None
        self._asked: dict[RequestId, _Asked] = {}
        self._by_wire: dict[RequestId, _Asked] = {}
        self._facts: dict[str, Value] = {}
        self._why_not = "the pipeline is still starting"
        self._lost_s: float | None = None  # since when there is no Head, if there was one
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and stay connected, in the background of the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def close(self) -> None:
        """Let go of the Head; requests on the way end with an error."""
        if self._task is not None:
            self._task.cancel()
        self._link, self._lost_s = None, None
        self._give_up("this ingress is shutting down")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the generator early cancels it.

        Raises OverloadedError when the pipeline has no room, PipelineError when there has been none yet.
        """
        if self._link is None and self._lost_s is None:
            raise PipelineError(f"no pipeline is ready: {self._why_not}")
        asked = _Asked(request)
        self._asked[request.id] = asked
        if self._link is not None:
            self._submit(asked)
        ended = False
        try:
            while not ended:
                event = await asked.events.get()
                ended = isinstance(event, FinishedEvent | FailedEvent)
                if isinstance(event, FailedEvent) and event.kind == "overloaded":
                    raise OverloadedError(event.message)
                yield event
        finally:
            self._asked.pop(request.id, None)
            self._leave(asked)
            if not ended and asked.wire_id is not None:
                self._say(Stop(asked.wire_id, keep=False))

    async def stop(self, id: RequestId) -> None:
        """End the request and keep its tokens so far."""
        asked = self._asked.get(id)
        if asked is not None:
            asked.stopped = True
            if asked.wire_id is not None:
                self._say(Stop(asked.wire_id, keep=True))

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

    def _submit(self, asked: _Asked) -> None:
        self._leave(asked)
        if asked.times >= MAX_RESUMED:
            self._end(asked, FailedEvent(asked.request.id, "pipeline", f"{asked.times} pipelines were lost"))
            return
        left_ms = asked.left_ms
        if left_ms is not None and left_ms <= 0:
            self._end(asked, FailedEvent(asked.request.id, "deadline", str(DeadlineError())))
            return
        call = asked.call()
        self._by_wire[call.request.id] = asked
        self._say(call)

    def _leave(self, asked: _Asked) -> None:
        """Whatever is still told of it under its id so far is not heard."""
        if asked.wire_id is not None:
            self._by_wire.pop(asked.wire_id, None)

    def _end(self, asked: _Asked, event: FinishedEvent | FailedEvent) -> None:
        self._leave(asked)
        asked.ended = True
        asked.events.put_nowait(event)

    async def _stay_connected(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOCATE_S):
                    address = await self._locate()
                link = await connect(address, _MAX_FRAME_BYTES)
            except Exception as e:  # whatever it was: without this loop no request would ever go on
                if not isinstance(e, LlmdError | TimeoutError):
                    _log.exception("the pipeline's head cannot be found")
                self._why_not = str(e) or "nobody says where the pipeline's head is"
                waited_s = 0.0 if self._lost_s is None else time.monotonic() - self._lost_s
                if waited_s > self._wait_s or isinstance(e, ReplacedError):
                    self._lost_s = None
                    self._give_up(f"no pipeline is there after {waited_s:.0f} s: {e}")
                await asyncio.sleep(_RETRY_S)
                continue
            await self._use(link)

    async def _use(self, link: Link) -> None:
        """Until it ends: every request goes on by it."""
        self._link, self._lost_s = link, None
        asking = asyncio.create_task(self._ask_status())
        try:
            for asked in [asked for asked in self._asked.values() if not asked.ended]:
                self._submit(asked)
            await self._listen(link)
        except LlmdError as e:
            _log.warning("the head's link broke: %s", e)
        except Exception:
            _log.exception("the head's link is given up")
        finally:
            asking.cancel()
            link.close()
            self._link, self._facts, self._lost_s = None, {}, time.monotonic()
            self._why_not = "the connection to the pipeline's head was lost"

    async def _listen(self, link: Link) -> None:
        while (frame := await link.receive()) is not None:
            events, status = decode_events(frame)
            if status is not None:
                self._facts = status.facts
            for event in events:
                asked = self._by_wire.get(event.id)
                if asked is not None:  # else the client is gone and the Head has been told
                    self._hear(asked, event)

    def _hear(self, asked: _Asked, event: Event | Accepted) -> None:
        match event:
            case Accepted():
                asked.nonce = asked.nonce or event.node_nonce
            case TokensEvent():
                asked.drawn += event.tokens
                asked.events.put_nowait(replace(event, id=asked.request.id))
            case FailedEvent(kind="lost"):
                self._leave(asked)  # the Head ends, and with it this link; it goes on with the next one
            case _:
                self._end(asked, replace(event, id=asked.request.id))

    async def _ask_status(self) -> None:
        while True:
            self._say(AskStatus())
            await asyncio.sleep(_STATUS_EVERY_S)

    def _give_up(self, why: str) -> None:
        for id, asked in self._asked.items():
            if not asked.ended:
                self._end(asked, FailedEvent(id, "pipeline", why))
