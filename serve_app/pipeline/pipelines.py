"""Several pipelines of one model as one Generator: each request to one of them, and on to another if that one is lost.

Which one is for routing.py to say. A pipeline without room is passed over for the next best, each asked once. What runs
on one whose Head is gone waits a moment for the next one there, and then goes on with another, as it would with that:
by prompt, tokens so far and nonce. No request is ever sent to two at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from serve_app.errors import DeadlineError, PipelineError
from serve_app.messages.request import Event, FailedEvent, GenerationRequest, RequestId
from serve_app.pipeline.asked import Asked
from serve_app.pipeline.head_client import WAIT_S, HeadClient, Health, Locate, pipeline_of
from serve_app.pipeline.routing import Candidate, Prefixes, choose, homes
from shard_tools.canonical import Value

_log = logging.getLogger(__name__)
MOVE_AFTER_S = 1.0  # a link that only broke is back by then; whoever goes on computes all rows again
_LOOK_EVERY_S = 0.2


class Pipelines:
    """Implements api/generator.py's Generator."""

    def __init__(self, locates: Sequence[Locate], wait_s: float = WAIT_S, move_after_s: float = MOVE_AFTER_S) -> None:
        """locates: for each pipeline, as HeadClient's. wait_s: how long a request waits for any of them.

        move_after_s: how long for its own, while another one could take it.
        """
        self._clients = [HeadClient(locate, wait_s, self._elsewhere) for locate in locates]
        self._wait_s, self._move_after_s = wait_s, move_after_s
        self._prefixes = Prefixes(len(locates))
        self._epochs: list[Value] = [None] * len(locates)
        self._asked: dict[RequestId, Asked] = {}
        self._turns = itertools.count(1)
        self._last = [0] * len(locates)  # when each was chosen last
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect to all, and stay connected, in the background of the running loop."""
        for client in self._clients:
            client.start()
        self._task = asyncio.get_running_loop().create_task(self._look_after())

    def close(self) -> None:
        """Let go of all; requests on the way end with an error."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        for client in self._clients:
            client.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """As Generator. Raises PipelineError where no pipeline is there and none is waited for."""
        asked = Asked(request)
        if len(self._clients) > 1:
            if request.once is not None:
                asked.found = await self._holder(request.once.key)
            elif request.assurance == "signed":  # an audited answer shares no beginning
                asked.pages = self._prefixes.pages(request.prompt_ids, request.cache_salt)
        to = self._best(asked)
        if to is None:
            to = self._awaited(asked)
        if to is None:
            raise PipelineError(f"no pipeline is ready: {self._why_not()}")
        self._asked[request.id] = asked
        self._hand(asked, to)
        try:
            while not asked.told_all:
                yield await asked.next()
        finally:
            self._asked.pop(request.id, None)
            self._clients[asked.at].part(asked)

    async def stop(self, id: RequestId) -> None:
        """As Generator."""
        asked = self._asked.get(id)
        if asked is not None:
            await self._clients[asked.at].stop(id)

    async def ready(self) -> bool:
        """Whether one of them is."""
        return any([await client.ready() for client in self._clients])

    def status(self) -> dict[str, Value]:
        """What each Head last said of its pipeline, and what this ingress thinks of it."""
        said = [client.status() for client in self._clients]
        pipelines: list[Value] = []
        for i, (client, facts) in enumerate(zip(self._clients, said, strict=True)):
            own: dict[str, Value] = {
                "replica": i,
                "ready": client.health is not Health.AWAY,
                "problem": facts.get("problem"),
                "load": client.load,
            }
            audit: dict[str, Value] = {"audit": facts["audit"]} if "audit" in facts and len(said) > 1 else {}
            pipelines.append({"stages": [], **pipeline_of(facts), **own, **audit})
        ready = any(facts.get("ready") is True for facts in said)
        out: dict[str, Value] = {"ready": ready, "pipelines": pipelines}
        if not ready:
            out["problem"] = self._why_not()
        first = next((facts["audit"] for facts in said if "audit" in facts), None)
        return out if first is None else out | {"audit": first}

    def _best(self, asked: Asked) -> int | None:
        """The pipeline that is to have it; None if all that work have refused it, or none works."""
        health = [client.health for client in self._clients]
        best = max(health)
        if best is Health.AWAY:
            return None
        once = asked.request.once
        if once is not None:  # its home alone refuses it: a retry through another ingress must find it
            order = [i for i in homes(once.key, len(health)) if health[i] is not Health.AWAY]
            to = asked.found if asked.found in order else order[0]
            return None if to in asked.refused_by else to
        able = [i for i, how in enumerate(health) if how is best and i not in asked.refused_by]
        if not able:
            return None
        return choose([self._candidate(i, asked) for i in able]).index

    def _candidate(self, i: int, asked: Asked) -> Candidate:
        epoch = self._clients[i].epoch
        if epoch is not None and epoch != self._epochs[i]:
            self._epochs[i] = epoch
            self._prefixes.forget(i)
        return Candidate(i, self._clients[i].load, self._prefixes.matched(i, asked.pages), self._last[i])

    async def _holder(self, key: bytes) -> int | None:
        """The pipeline that has a request under this key: it was moved there, or there were more or fewer of them."""
        held = await asyncio.gather(*(client.holds(key) for client in self._clients))
        return next((i for i in homes(key, len(held)) if held[i]), None)

    def _awaited(self, asked: Asked) -> int | None:
        """Where it may wait for the next Head; not where it is."""
        there = [i for i, client in enumerate(self._clients) if client.is_awaited]
        if asked.request.id in self._asked:
            there = [i for i in there if i != asked.at]
        return min(there, key=lambda i: self._clients[i].load, default=None)

    def _hand(self, asked: Asked, to: int) -> None:
        asked.at = to
        self._last[to] = next(self._turns)
        self._prefixes.note(to, asked.pages)
        self._clients[to].take(asked)

    def _move(self, asked: Asked, to: int) -> None:
        self._clients[asked.at].part(asked)
        self._hand(asked, to)

    def _elsewhere(self, asked: Asked, why: FailedEvent) -> bool:
        """As head_client.Elsewhere."""
        if self._closed or self._asked.get(asked.request.id) is not asked:
            return False
        refused = why.kind == "overloaded"
        if refused:
            asked.refused_by.add(asked.at)
        to = self._best(asked)
        if to is None and not refused:
            to = self._awaited(asked)
        if to is not None and to != asked.at:
            self._move(asked, to)
            return True
        return refused and bool(asked.nonce)  # one that has begun is not refused: it waits until there is room

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                self._go_on(time.monotonic())
            except Exception:  # a mistake of ours must not leave every later request where it is
                _log.exception("requests cannot be looked after")

    def _go_on(self, now_s: float) -> None:
        """Requests that no Head has, and that have waited for theirs, go to one that works."""
        for asked in list(self._asked.values()):
            if asked.ended or asked.idle_since_s is None or now_s - asked.idle_since_s < self._move_after_s:
                continue
            client = self._clients[asked.at]
            if asked.is_late:
                client.fail(asked, str(DeadlineError()), "deadline")
            elif asked.waits_since_s is not None and now_s - asked.waits_since_s > self._wait_s:
                client.fail(asked, f"no pipeline has taken it over within {self._wait_s:.0f} s")
            else:
                asked.refused_by = {asked.at}  # the others first
                to = self._best(asked)
                asked.refused_by.clear()
                to = self._best(asked) if to is None else to
                if to is not None:
                    _log.info("request %s goes on with pipeline %d, before with %d", asked.request.id, to, asked.at)
                    self._move(asked, to)

    def _why_not(self) -> str:
        said = [str(client.status().get("problem") or "it does not work now") for client in self._clients]
        return said[0] if len(said) == 1 else "; ".join(f"pipeline {i}: {why}" for i, why in enumerate(said))
