"""The ingress's side of a Head: implements api/generator.py's Generator over one link, and keeps that link alive.

A request outlives its Head. What is needed to go on with it is held here, prompt and tokens so far, and submitted to
the Head that comes next; whoever reads its events sees a pause. Before the first Head requests are refused. Where there
are several pipelines (pipelines.py), one that this Head cannot go on with may go to another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from enum import IntEnum

from serve_app.errors import DeadlineError, PipelineError, ReplacedError
from serve_app.messages.events import (
    MAX_RESUMED,
    Accepted,
    AskStatus,
    Call,
    Held,
    Seek,
    Stop,
    decode_events,
    encode_call,
)
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FailureKind,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    TokensEvent,
)
from serve_app.pipeline.asked import Asked
from serve_app.transport.link import Link, LinkAddress, connect
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)
_RETRY_S = 0.2
_LOCATE_S = 10.0  # for the Supervisor to say where; one that is being restarted takes some seconds
_STATUS_EVERY_S = 1.0
_SEEK_S = 1.0  # a Head that has stopped must not hold up requests that others could take
_MAX_FRAME_BYTES = 64 << 20
WAIT_S = 180.0  # for the next Head: as long as a Head waits for a stage, or a pipeline of some gigabytes to be built

Locate = Callable[[], Awaitable[LinkAddress]]
# Whether another pipeline takes the request over, which would end so here. It is then no longer this one's.
Elsewhere = Callable[[Asked, FailedEvent], bool]


class Health(IntEnum):
    """How good it is to send a request to a pipeline."""

    AWAY = 0  # no Head, or one that has given its pipeline up
    HALTED = 1  # it takes requests in, which wait for a part that is replaced
    UP = 2


class HeadClient:
    """Requests to one pipeline, wherever its Head is now."""

    def __init__(self, locate: Locate, wait_s: float = WAIT_S, elsewhere: Elsewhere = lambda *_: False) -> None:
        """locate: where the Head listens now; asked again whenever the link broke. May raise PipelineError.

        wait_s: how long requests wait for the next Head.
        """
        self._locate, self._wait_s, self._elsewhere = locate, wait_s, elsewhere
        self._link: Link | None = None
        self._asked: dict[RequestId, Asked] = {}
        self._by_wire: dict[RequestId, Asked] = {}
        self._facts: dict[str, Value] = {}
        self._sought: dict[bytes, asyncio.Future[bool]] = {}  # keys that the Head was asked about
        self._of_others = 0  # requests that the Head had of other ingresses when it last spoke
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
        self._link, self._lost_s, self._elsewhere = None, None, lambda *_: False
        self._give_up("this ingress is shutting down")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the generator early cancels it.

        Raises OverloadedError when the pipeline has no room, PipelineError when there has been none yet.
        """
        if not self.is_awaited:
            raise PipelineError(f"no pipeline is ready: {self._why_not}")
        asked = Asked(request)
        self.take(asked)
        try:
            while not asked.told_all:
                yield await asked.next()
        finally:
            self.part(asked)

    def take(self, asked: Asked) -> None:
        """Have the Head run it; while there is none, it waits for the next one."""
        self._asked[asked.request.id] = asked
        if self._link is not None:
            self._submit(asked)
        else:
            asked.wait()

    def part(self, asked: Asked) -> None:
        """It is not this pipeline's any more; what still runs of it here is cancelled."""
        self._asked.pop(asked.request.id, None)
        self._leave(asked)
        if not asked.ended and asked.wire_id is not None:
            self._say(Stop(asked.wire_id, keep=False))

    async def stop(self, id: RequestId) -> None:
        """End the request and keep its tokens so far."""
        asked = self._asked.get(id)
        if asked is not None:
            asked.stopped = True
            if asked.wire_id is not None:
                self._say(Stop(asked.wire_id, keep=True))

    async def holds(self, key: bytes) -> bool:
        """Whether the Head says that it has a request under this key, or what it came to."""
        if self._link is None:
            return False
        asked = self._sought.get(key)
        if asked is None:
            asked = self._sought[key] = asyncio.get_running_loop().create_future()
            self._say(Seek(key))
        try:
            async with asyncio.timeout(_SEEK_S):
                return await asyncio.shield(asked)
        except TimeoutError:
            self._sought.pop(key, None)
            return False

    def status(self) -> dict[str, Value]:
        """What the Head last said of its pipeline."""
        if self._link is None:
            return {"pipelines": [], "problem": self._why_not}
        return self._facts

    async def ready(self) -> bool:
        """Whether the Head is linked and says that its pipeline has generated a token and works."""
        return self._link is not None and self._facts.get("ready") is True

    @property
    def health(self) -> Health:
        """Whether requests are well off here now."""
        if self._link is None or self._facts.get("ready") is False:
            return Health.AWAY
        return Health.UP if pipeline_of(self._facts).get("waits_for") is None else Health.HALTED

    @property
    def is_awaited(self) -> bool:
        """There is a Head, or was one: requests may wait for the next, where this one can do no more."""
        return self._link is not None or self._lost_s is not None

    @property
    def load(self) -> int:
        """Requests that it has to run: ours as of now, those of other ingresses as of the Head's last word."""
        return self._of_others + sum(asked.weight for asked in self._asked.values())

    @property
    def epoch(self) -> Value:
        """Of its stages, if the Head has said so: in another one they hold no KV of this one's."""
        return pipeline_of(self._facts).get("epoch")

    def fail(self, asked: Asked, why: str, kind: FailureKind = "pipeline") -> None:
        """End a request that no Head has."""
        self._end(asked, FailedEvent(asked.request.id, kind, why))

    def _say(self, call: Call) -> None:
        if self._link is not None:
            self._link.send(encode_call(call))

    def _submit(self, asked: Asked) -> None:
        self._leave(asked)
        if asked.times >= MAX_RESUMED:
            self.fail(asked, f"{asked.times} pipelines were lost")
            return
        if asked.is_late:
            self.fail(asked, str(DeadlineError()), "deadline")
            return
        call = asked.call()
        self._by_wire[call.request.id] = asked
        self._say(call)

    def _leave(self, asked: Asked) -> None:
        """Whatever is still told of it under its id so far is not heard."""
        if asked.wire_id is not None:
            self._by_wire.pop(asked.wire_id, None)

    def _end(self, asked: Asked, event: FinishedEvent | FailedEvent) -> None:
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
            for asked in self._not_ended():
                self._submit(asked)
            await self._listen(link)
        except LlmdError as e:
            _log.warning("the head's link broke: %s", e)
        except Exception:
            _log.exception("the head's link is given up")
        finally:
            asking.cancel()
            link.close()
            self._link, self._facts, self._lost_s, self._of_others = None, {}, time.monotonic(), 0
            self._why_not = "the connection to the pipeline's head was lost"
            for key in list(self._sought):
                self._found(key, False)
            for asked in self._not_ended():
                asked.wait()

    async def _listen(self, link: Link) -> None:
        while (frame := await link.receive()) is not None:
            events, status = decode_events(frame)
            if status is not None:
                self._facts = status.facts
                there = [pipeline_of(status.facts).get(name) for name in ("running", "waiting")]
                self._of_others = max(0, sum(n for n in there if isinstance(n, int)) - len(self._asked))
            for event in events:
                if isinstance(event, Held):
                    self._found(event.key, event.here)
                    continue
                asked = self._by_wire.get(event.id)
                if asked is not None:  # else the client is gone and the Head has been told
                    self._hear(asked, event)

    def _found(self, key: bytes, here: bool) -> None:
        asked = self._sought.pop(key, None)
        if asked is not None and not asked.done():
            asked.set_result(here)

    def _hear(self, asked: Asked, event: Event | Accepted) -> None:
        match event:
            case Accepted():
                asked.accepted(event.node_nonce)
            case TokensEvent():
                asked.drawn += event.tokens
                asked.events.put_nowait(replace(event, id=asked.request.id))
            case FailedEvent(kind="lost"):
                self._leave(asked)  # the Head ends, and with it this link; it goes on with the next one
                asked.wait()
            case FailedEvent(kind="overloaded"):
                self._leave(asked)
                asked.refused()
                self._refuse(asked, replace(event, id=asked.request.id))
            case _:
                self._end(asked, replace(event, id=asked.request.id))

    def _refuse(self, asked: Asked, why: FailedEvent) -> None:
        if not self._elsewhere(asked, why):
            self._end(asked, why)

    async def _ask_status(self) -> None:
        while True:
            self._say(AskStatus())
            await asyncio.sleep(_STATUS_EVERY_S)

    def _give_up(self, why: str) -> None:
        for asked in self._not_ended():
            self._refuse(asked, FailedEvent(asked.request.id, "pipeline", why))

    def _not_ended(self) -> list[Asked]:
        return [asked for asked in self._asked.values() if not asked.ended]


def pipeline_of(facts: dict[str, Value]) -> dict[str, Value]:
    """What a Head says of its pipeline; nothing if it has said nothing."""
    pipelines = facts.get("pipelines")
    first = pipelines[0] if isinstance(pipelines, list) and pipelines else None
    return first if isinstance(first, dict) else {}
