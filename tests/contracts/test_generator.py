"""What every Generator keeps, whichever it is: the echo of the HTTP tests, a whole pipeline in one process, and two of
them behind sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serve_app.api.echo import EchoGenerator
from serve_app.api.generator import Generator
from serve_app.errors import OverloadedError
from serve_app.messages.request import (
    Event,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.pipeline.head_server import LOOPBACK, HeadServer
from serve_app.pipeline.pipelines import Pipelines
from shard_tools import canonical
from shard_tools.cid import Cid, Codec


@dataclass(frozen=True)
class Subject:
    """A ready generator, the model it has, and how many requests fill it."""

    generator: Generator
    manifest: Cid
    capacity: int

    def request(self, id: str, max_tokens: int = 5) -> GenerationRequest:
        ids = tuple(range(3, 103))
        return GenerationRequest(
            RequestId(id), self.manifest, ids, max_tokens, Sampling(temperature_micro=0), (), b"", fresh_salt()
        )


@asynccontextmanager
async def echo(folder: Path) -> AsyncIterator[Subject]:
    yield Subject(EchoGenerator(pace_s=0.002, max_running=3), Cid.of(Codec.DAG_CBOR, b"echo"), 3)


def tiny_pipeline(folder: Path, pipelines: int) -> list[Any]:
    """So many pipelines of one tiny model, each with room for two requests and a third one that waits."""
    house: Any = pytest.importorskip("serve_app.local")
    load: Any = pytest.importorskip("serve_app.engine.load")
    checkpoints: Any = pytest.importorskip("tests.tiny_models")
    split: Any = pytest.importorskip("shard_tools.checkpoint.split")
    source: Any = pytest.importorskip("shard_tools.checkpoint.source")
    memory: Any = pytest.importorskip("shard_tools.store.memory")
    store = memory.MemoryStore()
    manifest = split.split(source.open_checkpoint(checkpoints.write_tiny_checkpoint(folder / "tiny")), store, "tiny")
    options = load.LoadOptions(device="cpu", dtype="float32", page_size=16, threads=1)
    limits = house.LocalLimits(n_pages=256, max_running=2, max_waiting=1)
    return [house.LocalPipeline(store, manifest, stages=2, options=options, limits=limits) for _ in range(pipelines)]


@asynccontextmanager
async def local(folder: Path) -> AsyncIterator[Subject]:
    (pipeline,) = tiny_pipeline(folder, 1)
    try:
        await pipeline.warm_up()
        yield Subject(pipeline, pipeline.manifest.cid, 3)
    finally:
        pipeline.close()


@asynccontextmanager
async def routed(folder: Path) -> AsyncIterator[Subject]:
    made = tiny_pipeline(folder, 2)
    servers, locates = [], []
    for pipeline in made:
        await pipeline.warm_up()
        facts: Any = lambda pipeline=pipeline: {"ready": True, **pipeline.status()}
        servers.append(HeadServer(pipeline.head, facts))
        locates.append(partial(asyncio.sleep, 0, await servers[-1].listen(LOOPBACK)))
    ingress = Pipelines(locates)
    ingress.start()
    try:
        while not all(await asyncio.gather(*(client.ready() for client in ingress._clients))):
            await asyncio.sleep(0.01)
        yield Subject(ingress, made[0].manifest.cid, 6)
    finally:
        ingress.close()
        for server in servers:
            server.close()
        for pipeline in made:
            pipeline.close()


@pytest.fixture(params=[echo, local, routed], ids=["echo", "local", "routed"])
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[Subject], Awaitable[None]]], None]:
    """Runs a law against one implementation, in an event loop of its own, within 60 s."""

    def run(law: Callable[[Subject], Awaitable[None]]) -> None:
        async def opened() -> None:
            async with asyncio.timeout(60), request.param(tmp_path) as subject:
                await law(subject)

        asyncio.run(opened())

    return run


Check = Callable[[Callable[[Subject], Awaitable[None]]], None]


async def all_events(subject: Subject, id: str, max_tokens: int = 5) -> list[Event]:
    return [event async for event in subject.generator.generate(subject.request(id, max_tokens))]


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens]


def test_tokens_come_first_and_one_end_with_a_receipt_comes_last(check: Check) -> None:
    async def law(subject: Subject) -> None:
        events = await all_events(subject, "r", 5)
        assert [type(e) for e in events[:-1]] == [TokensEvent] * (len(events) - 1)
        assert isinstance(events[-1], FinishedEvent) and events[-1].receipt
        assert {e.id for e in events} == {"r"}
        assert (len(tokens_of(events)), events[-1].reason) == (5, "length")

    check(law)


def test_requests_side_by_side_get_what_each_would_get_alone(check: Check) -> None:
    async def law(subject: Subject) -> None:
        alone = tokens_of(await all_events(subject, "alone", 20))
        together = await asyncio.gather(*(all_events(subject, f"r{i}", 20) for i in range(subject.capacity)))
        assert [tokens_of(events) for events in together] == [alone] * subject.capacity

    check(law)


def test_stop_keeps_the_tokens_so_far_and_the_end_still_comes(check: Check) -> None:
    async def law(subject: Subject) -> None:
        events = []
        async with aclosing(subject.generator.generate(subject.request("r", 90))) as stream:
            async for event in stream:
                events.append(event)
                if len(tokens_of(events)) == 3:
                    await subject.generator.stop(RequestId("r"))
        assert 3 <= len(tokens_of(events)) < 90
        assert isinstance(events[-1], FinishedEvent) and events[-1].reason == "stop" and events[-1].receipt
        await subject.generator.stop(RequestId("r"))
        await subject.generator.stop(RequestId("never was"))

    check(law)


def test_closing_early_gives_the_place_back(check: Check) -> None:
    async def law(subject: Subject) -> None:
        for i in range(3 * subject.capacity):
            async with aclosing(subject.generator.generate(subject.request(f"r{i}", 90))) as stream:
                await anext(stream)
        assert tokens_of(await all_events(subject, "after"))

    check(law)


def test_a_cancelled_reader_gives_the_place_back(check: Check) -> None:
    async def law(subject: Subject) -> None:
        for i in range(3 * subject.capacity):
            reader = asyncio.create_task(all_events(subject, f"r{i}", 90))
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait({reader})
        assert tokens_of(await all_events(subject, "after"))

    check(law)


def test_one_too_many_is_refused_before_its_first_event_and_the_others_go_on(check: Check) -> None:
    async def law(subject: Subject) -> None:
        running = [asyncio.create_task(all_events(subject, f"r{i}", 90)) for i in range(subject.capacity)]
        await asyncio.sleep(0)  # each has asked
        with pytest.raises(OverloadedError):
            await anext(subject.generator.generate(subject.request("one too many")))
        assert [len(tokens_of(await task)) for task in running] == [90] * subject.capacity

    check(law)


def test_it_is_ready_and_its_status_can_be_written_down(check: Check) -> None:
    async def law(subject: Subject) -> None:
        assert await subject.generator.ready()
        assert canonical.encode(subject.generator.status())

    check(law)
