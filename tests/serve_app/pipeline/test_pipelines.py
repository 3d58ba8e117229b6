"""Two pipelines of one model behind one ingress, over real sockets: where requests go, and on when one is lost."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.engine.load import LoadOptions
from serve_app.errors import OverloadedError, PipelineError, ReplacedError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    Once,
    RequestId,
    Sampling,
    TokensEvent,
)
from serve_app.pipeline.head_server import LOOPBACK, HeadServer
from serve_app.pipeline.pipelines import Pipelines
from serve_app.pipeline.routing import MOST_AHEAD, PAGE_TOKENS, homes
from serve_app.receipts.check import Expected, check
from serve_app.transport.link import LinkAddress
from shard_tools import canonical
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

Tiny = tuple[MemoryStore, Manifest]
PAGES = 256


@dataclass
class Side:
    """One pipeline, and whether its Head can be found."""

    pipeline: LocalPipeline
    server: HeadServer | None = None
    address: LinkAddress | None = None
    why_not: PipelineError = field(default_factory=lambda: PipelineError("nowhere"))

    async def locate(self) -> LinkAddress:
        if self.address is None:
            raise self.why_not
        return self.address

    async def open(self) -> None:
        head = self.pipeline.head
        facts = lambda: {"ready": head.failure is None, "pipelines": [head.status()]}
        self.server = HeadServer(self.pipeline.head, facts)
        self.address = await self.server.listen(LOOPBACK)

    def lose(self, why_not: PipelineError | None = None) -> None:
        assert self.server is not None
        self.address, self.why_not = None, why_not or self.why_not
        self.server.close()

    @property
    def drawn(self) -> int:
        return self.pipeline.head.tokens_drawn

    @property
    def idle(self) -> bool:
        return self.pipeline.head.status()["running"] == 0


@asynccontextmanager
async def house(
    tiny: Tiny, *, move_after_s: float = 0.2, wait_s: float = 20, doors: int = 1, **limits: int
) -> AsyncIterator[tuple[list[Side], list[Pipelines]]]:
    """Two pipelines, and ingresses that reach both."""
    options, sizes = LoadOptions("cpu", "float32", 16, None), LocalLimits(**({"n_pages": PAGES} | limits))
    sides = [Side(LocalPipeline(*tiny, stages=1, options=options, limits=sizes)) for _ in range(2)]
    ingresses = [Pipelines([side.locate for side in sides], wait_s, move_after_s) for _ in range(doors)]
    try:
        async with asyncio.timeout(60):
            for side in sides:
                await side.pipeline.warm_up()
                await side.open()
            for ingress in ingresses:
                ingress.start()
                await until(lambda ingress=ingress: both_ready(ingress))  # type: ignore[misc]
            yield sides, ingresses
    finally:
        for ingress in ingresses:
            ingress.close()
        for side in sides:
            if side.server is not None:
                side.server.close()
            side.pipeline.close()


def both_ready(ingress: Pipelines) -> bool:
    state: Any = ingress.status()
    return all("epoch" in pipeline and pipeline["ready"] for pipeline in state["pipelines"])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def request(
    tiny: Tiny, name: str, tokens: int = 5, first: int = 5, length: int = 3, **fields: Any
) -> GenerationRequest:
    prompt = tuple(first + i % 90 for i in range(length))
    salt = secrets.token_bytes(32)
    asked = GenerationRequest(RequestId(name), tiny[1].cid, prompt, tokens, Sampling(0), (), b"", salt)
    return replace(asked, **fields)


async def whole(ingress: Pipelines, asked: GenerationRequest) -> tuple[list[int], Event]:
    events = [event async for event in ingress.generate(asked)]
    assert all(event.id == asked.id for event in events)
    return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens], events[-1]


async def begin(ingress: Pipelines, asked: GenerationRequest) -> tuple[Any, list[int]]:
    """Its stream, and the first tokens."""
    stream = ingress.generate(asked)
    event = await anext(stream)
    assert isinstance(event, TokensEvent)
    return stream, list(event.tokens)


async def rest(stream: Any) -> tuple[list[int], Event]:
    events = [event async for event in stream]
    return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens], events[-1]


def grown(sides: list[Side], before: list[int]) -> list[int]:
    """Which of them have drawn tokens since."""
    return [i for i, (side, n) in enumerate(zip(sides, before, strict=True)) if side.drawn > n]


def test_what_begins_alike_goes_to_one_pipeline_and_new_beginnings_to_both(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            homes_of = []
            for first in range(4):
                went = set()
                for turn in range(3):
                    before = [side.drawn for side in sides]
                    asked = request(tiny, f"{first}-{turn}", first=first, length=(2 + turn) * PAGE_TOKENS)
                    assert isinstance((await whole(ingress, asked))[1], FinishedEvent)
                    went.add(tuple(grown(sides, before)))
                assert len(went) == 1
                homes_of.append(went.pop())
            assert set(homes_of) == {(0,), (1,)}

    asyncio.run(main())


def test_a_beginning_does_not_hold_back_what_is_idle_elsewhere(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            asked = [request(tiny, f"r{i}", 60, length=3 * PAGE_TOKENS) for i in range(MOST_AHEAD + 4)]
            before = [side.drawn for side in sides]
            answers = await asyncio.gather(*(whole(ingress, one) for one in asked))
            assert grown(sides, before) == [0, 1]
            assert len({tuple(tokens) for tokens, _ in answers}) == 1 and len(answers[0][0]) == 60

    asyncio.run(main())


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(900_000)], ids=["greedy", "random"])
def test_a_request_whose_pipeline_is_lost_goes_on_with_the_other_behind_the_tokens_it_has(
    tiny: Tiny, sampling: Sampling
) -> None:
    """Every token once and in order; the receipt is of all of them; and the other pipeline's own go on meanwhile."""

    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            asked = request(tiny, "moves", 60, sampling=sampling)
            first = [side.drawn for side in sides]
            stream, tokens = await begin(ingress, asked)
            (at,) = grown(sides, first)
            beside = asyncio.create_task(whole(ingress, request(tiny, "beside", 60)))
            await until(lambda: sides[1 - at].drawn > first[1 - at])
            sides[at].lose()
            more, last = await rest(stream)
            tokens += more
            assert len(tokens) == 60 and isinstance(last, FinishedEvent)
            expected = Expected(out_ids=tuple(tokens), prompt_ids=asked.prompt_ids)
            operator = sides[1 - at].pipeline.operator.public
            checked = check(last.receipt, operator, now_s=int(time.time()), request=expected)
            assert checked.receipt.attempt == 1024
            assert isinstance((await beside)[1], FinishedEvent)
            if not sampling.temperature_micro:
                assert (await whole(ingress, replace(asked, id=RequestId("alone"))))[0] == tokens
            state: Any = ingress.status()
            assert state["ready"] and [p["ready"] for p in state["pipelines"]] == [i != at for i in range(2)]
            assert state["pipelines"][at]["problem"] and canonical.encode(state)

    asyncio.run(main())


def test_one_whose_link_only_broke_stays_where_it_is(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, move_after_s=15) as (sides, (ingress,)):
            before = [side.drawn for side in sides]
            stream, tokens = await begin(ingress, request(tiny, "stays", 60))
            (at,) = grown(sides, before)
            sides[at].lose()
            await sides[at].open()
            more, last = await rest(stream)
            assert len(tokens + more) == 60 and isinstance(last, FinishedEvent)
            assert grown(sides, before) == [at]

    asyncio.run(main())


def test_a_pipeline_that_is_not_coming_back_keeps_nobody_waiting(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, move_after_s=60) as (sides, (ingress,)):
            before = [side.drawn for side in sides]
            stream, tokens = await begin(ingress, request(tiny, "moves", 60))
            (at,) = grown(sides, before)
            sides[at].lose(ReplacedError("there is one pipeline fewer now"))
            async with asyncio.timeout(15):
                more, last = await rest(stream)
            assert len(tokens + more) == 60 and isinstance(last, FinishedEvent)

    asyncio.run(main())


def test_without_any_pipeline_requests_end_in_time_and_new_ones_are_refused_with_every_reason(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, wait_s=0.5) as (sides, (ingress,)):
            stream, _ = await begin(ingress, request(tiny, "ends", 200))
            for i, side in enumerate(sides):
                side.lose(PipelineError(f"reason {i}"))
            last = (await rest(stream))[1]
            assert isinstance(last, FailedEvent) and last.kind == "pipeline"
            await until(lambda: not any(client.is_awaited for client in ingress._clients))
            with pytest.raises(PipelineError, match=r"pipeline 0: reason 0; pipeline 1: reason 1"):
                await whole(ingress, request(tiny, "refused"))
            assert not await ingress.ready()
            await sides[1].open()
            await until(lambda: ingress.status()["ready"] is True)
            assert isinstance((await whole(ingress, request(tiny, "again")))[1], FinishedEvent)

    asyncio.run(main())


def test_between_a_head_that_has_given_up_and_the_next_one_requests_wait(tiny: Tiny) -> None:
    """Its link still stands for a moment: nobody is refused in that either."""

    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            for side in sides:
                side.pipeline.head.fail("a test")
            await until(lambda: ingress.status()["ready"] is False)
            answer = asyncio.create_task(whole(ingress, request(tiny, "waits", 20)))
            await until(lambda: RequestId("waits") in ingress._asked)
            for side in sides:
                side.lose()
            options, sizes = LoadOptions("cpu", "float32", 16, None), LocalLimits(n_pages=PAGES)
            sides.append(Side(LocalPipeline(*tiny, stages=1, options=options, limits=sizes)))
            await sides[2].open()
            sides[0].address = sides[2].address
            tokens, last = await answer
            assert isinstance(last, FinishedEvent) and len(tokens) == 20

    asyncio.run(main())


def test_what_one_has_no_room_for_the_other_takes_and_both_full_is_a_refusal(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, max_running=1, max_waiting=0) as (_, (ingress,)):
            long = request(tiny, "0", 350, length=4 * PAGE_TOKENS)
            first, _ = await begin(ingress, long)
            second, _ = await begin(ingress, replace(long, id=RequestId("1")))  # near the first, which has no room
            with pytest.raises(OverloadedError):
                await whole(ingress, replace(long, id=RequestId("2")))
            for stream in (first, second):
                tokens, last = await rest(stream)
                assert len(tokens) == 349 and isinstance(last, FinishedEvent)

    asyncio.run(main())


def test_one_that_has_begun_is_not_refused_but_waits_until_there_is_room(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, max_running=1, max_waiting=0) as (sides, (ingress,)):
            before = [side.drawn for side in sides]
            moving, tokens = await begin(ingress, request(tiny, "0", 300))
            (at,) = grown(sides, before)
            other, _ = await begin(ingress, request(tiny, "1", 200))
            sides[at].lose()
            more, last = await rest(moving)
            assert len(tokens + more) == 300 and isinstance(last, FinishedEvent), last
            assert isinstance((await rest(other))[1], FinishedEvent)

    asyncio.run(main())


def test_who_hangs_up_or_stops_is_heard_where_the_request_is_now(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            before = [side.drawn for side in sides]
            stream, _ = await begin(ingress, request(tiny, "stopped", 400))
            (at,) = grown(sides, before)
            sides[at].lose()
            await until(lambda: ingress._asked[RequestId("stopped")].at != at)
            hung, _ = await begin(ingress, request(tiny, "hung up", 400))
            await ingress.stop(RequestId("stopped"))
            last = (await rest(stream))[1]
            assert isinstance(last, FinishedEvent) and last.reason == "stop"
            await hung.aclose()
            await until(lambda: all(side.idle for side in sides))

    asyncio.run(main())


def keyed(tiny: Tiny, name: str, key: bytes, tokens: int = 200) -> GenerationRequest:
    once = Once(key, hashlib.sha256(b"asked").digest())
    return request(tiny, name, tokens, once=once, sampling=Sampling(900_000))  # another draw would tell


@pytest.mark.parametrize("home", [0, 1])
def test_a_retry_through_another_ingress_finds_the_pipeline_that_runs_it(tiny: Tiny, home: int) -> None:
    async def main() -> None:
        key = next(key for key in (bytes([i]) * 32 for i in range(99)) if homes(key, 2)[0] == home)
        async with house(tiny, doors=2) as (sides, (first, second)):
            before = [side.drawn for side in sides]
            stream, told = await begin(first, keyed(tiny, "first", key))
            await stream.aclose()
            tokens, last = await whole(second, keyed(tiny, "retried", key))
            assert isinstance(last, FinishedEvent) and len(tokens) == 200 and tokens[: len(told)] == told
            assert grown(sides, before) == [home] and sides[home].drawn - before[home] == 200

    asyncio.run(main())


def test_a_retry_through_another_ingress_finds_one_that_has_moved_even_once_its_home_is_back(tiny: Tiny) -> None:
    async def main() -> None:
        key = next(key for key in (bytes([i]) * 32 for i in range(99)) if homes(key, 2)[0] == 0)
        async with house(tiny, doors=2) as (sides, (ingress, other)):
            stream, told = await begin(ingress, keyed(tiny, "first", key))
            sides[0].lose()
            event = await anext(stream)
            while not sides[1].pipeline.head.status()["running"]:
                told += event.tokens
                event = await anext(stream)
            await sides[0].open()
            await until(lambda: both_ready(ingress) and both_ready(other))
            await stream.aclose()
            tokens, last = await whole(other, keyed(tiny, "retried", key))
            assert isinstance(last, FinishedEvent) and tokens[: len(told)] == told and len(tokens) == 200

    asyncio.run(main())


def test_a_key_whose_home_is_full_is_refused_and_its_retry_taken_in(tiny: Tiny) -> None:
    """Elsewhere a retry through another ingress would not find it."""

    async def main() -> None:
        key = next(key for key in (bytes([i]) * 32 for i in range(99)) if homes(key, 2)[0] == 0)
        async with house(tiny, max_running=1, max_waiting=0) as (sides, (ingress,)):
            streams = [(await begin(ingress, request(tiny, f"{i}", 400)))[0] for i in range(2)]
            with pytest.raises(OverloadedError):
                await whole(ingress, keyed(tiny, "refused", key, 5))
            for stream in streams:
                await stream.aclose()
            await until(lambda: all(side.idle for side in sides))
            assert isinstance((await whole(ingress, keyed(tiny, "taken", key, 5)))[1], FinishedEvent)

    asyncio.run(main())


def test_nothing_is_sent_where_no_head_is_whatever_comes_and_goes(tiny: Tiny) -> None:
    """A pipeline that comes back is used again, and one that is away draws nothing."""

    async def main() -> None:
        async with house(tiny) as (sides, (ingress,)):
            for turn in range(6):
                away = turn % 2
                sides[away].lose()
                await until(lambda away=away: not ingress.status()["pipelines"][away]["ready"])  # type: ignore
                before = [side.drawn for side in sides]
                answers = [whole(ingress, request(tiny, f"{turn}-{i}", 3, length=40)) for i in range(4)]
                assert all(isinstance(last, FinishedEvent) for _, last in await asyncio.gather(*answers))
                assert grown(sides, before) == [1 - away]
                await sides[away].open()
                await until(lambda: both_ready(ingress))

    asyncio.run(main())
