"""One request of an ingress, with whichever Head it is: what its reader was told, and what the next Head must know."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from serve_app.errors import OverloadedError
from serve_app.messages.events import Begun, Submit
from serve_app.messages.request import Event, FailedEvent, FinishedEvent, GenerationRequest, RequestId

_PROMPT_WEIGHT = 1024  # tokens of a prompt still to be computed that keep a pipeline as busy as a request that talks


@dataclass(slots=True)
class Asked:
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
    told_all: bool = False  # its reader has had the end
    idle_since_s: float | None = None  # on the monotonic clock: it is submitted nowhere since
    waits_since_s: float | None = None  # the same: no Head has taken it in since
    at: int = 0  # which of several pipelines has it
    found: int | None = None  # the pipeline that had its Idempotency-Key already
    refused_by: set[int] = field(default_factory=set)  # pipelines that had no room for it
    pages: tuple[bytes, ...] = ()  # of its prompt, as routing.Prefixes names them

    @property
    def left_ms(self) -> int | None:
        """What is left of its time; None where it has no deadline."""
        if self.request.timeout_ms is None:
            return None
        return self.request.timeout_ms - int((time.monotonic() - self.began_s) * 1000)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.left_ms is not None and self.left_ms <= 0

    @property
    def weight(self) -> int:
        """How much it loads its pipeline, in requests that talk."""
        return 1 if self.drawn else 1 + len(self.request.prompt_ids) // _PROMPT_WEIGHT

    def call(self) -> Submit:
        """What the next Head is told, while some of its time is left."""
        self.idle_since_s = None
        if not self.nonce:
            self.wire_id = self.request.id
            return Submit(replace(self.request, timeout_ms=self.left_ms))
        self.times += 1
        self.wire_id = RequestId(f"{self.request.id}~{self.times}")
        begun = Begun(tuple(self.drawn), self.stopped and bool(self.drawn), self.nonce, self.times)
        return Submit(replace(self.request, id=self.wire_id, timeout_ms=self.left_ms), begun)

    def accepted(self, nonce: bytes) -> None:
        """A Head has taken it in, with its own noise where no other had before."""
        self.nonce, self.waits_since_s = self.nonce or nonce, None

    def wait(self) -> None:
        """No Head has it now."""
        now_s = time.monotonic()
        self.idle_since_s = now_s if self.idle_since_s is None else self.idle_since_s
        self.waits_since_s = now_s if self.waits_since_s is None else self.waits_since_s

    def refused(self) -> None:
        """The Head that it was submitted to last did not take it in: that was no change of Heads."""
        if self.nonce:
            self.times -= 1
        self.wait()

    async def next(self) -> Event:
        """What its reader is told next. Raises OverloadedError where that is a refusal for want of room."""
        event = await self.events.get()
        self.told_all = isinstance(event, FinishedEvent | FailedEvent)
        if isinstance(event, FailedEvent) and event.kind == "overloaded":
            raise OverloadedError(event.message)
        return event
