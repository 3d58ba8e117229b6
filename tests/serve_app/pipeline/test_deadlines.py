"""A request whose time is over ends everywhere, whatever it was at: in the queue, drawing, waiting for a lost stage."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serve_app.api.answer import Answer
from serve_app.engine.load import LoadOptions
from serve_app.errors import DeadlineError, PipelineError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
)
from serve_app.pipeline.head_client import HeadClient
from serve_app.pipeline.head_server import LOOPBACK, HeadServer
from serve_app.transport.link import LinkAddress
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.serve_app.api.bytes_text import BytesText

Tiny = tuple[MemoryStore, Manifest]
PAGES = 128
LONG = 400  # tokens: longer than any deadline here


@asynccontextmanager
async def house(tiny: Tiny, max_running: int = 64) -> AsyncIterator[LocalPipeline]:
    """A pipeline that waits for lost stages; at the end nothing is left of any request."""
    options = LoadOptions("cpu", "float32", 4, None)
    pipeline = LocalPipeline(*tiny, stages=2, options=options, limits=LocalLimits(PAGES, max_running=max_running))
    pipeline.head._facts = replace(pipeline.head._facts, repair_s=60.0)
    await pipeline.warm_up()
    try:
        async with asyncio.timeout(30):
            yield pipeline
            head = pipeline.head
            while head._running or head._by_id or (head.lost is None and head.status()["free_pages"] != PAGES):
                await asyncio.sleep(0.01)
    finally:
        pipeline.close()


def request(manifest: Manifest, timeout_ms: int | None, name: str = "r", tokens: int = LONG) -> GenerationRequest:
    salt = secrets.token_bytes(32)
    return GenerationRequest(
        RequestId(name), manifest.cid, (5, 6, 7), tokens, Sampling(0), (), b"", salt, timeout_ms=timeout_ms
    )


async def last_of(pipeline: LocalPipeline, asked: GenerationRequest) -> Event:
    return [event async for event in pipeline.generate(asked)][-1]


def test_one_that_draws_is_cut_off_and_the_others_go_on(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as pipeline:
            timely = asyncio.create_task(last_of(pipeline, request(tiny[1], 60_000, "timely", 150)))
            got = [event async for event in pipeline.generate(request(tiny[1], 50))]
            assert isinstance(got[-1], FailedEvent) and got[-1].kind == "deadline"
            assert len(got) < LONG
            assert isinstance(await timely, FinishedEvent)

    asyncio.run(main())


def test_one_that_waits_in_the_queue_or_for_a_lost_stage_ends_at_its_deadline(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, max_running=1) as pipeline:
            running = pipeline.generate(request(tiny[1], None, "running"))
            await anext(running)
            queued = await last_of(pipeline, request(tiny[1], 20, "queued"))
            assert isinstance(queued, FailedEvent) and queued.kind == "deadline"
            await running.aclose()
            drawing = asyncio.create_task(last_of(pipeline, request(tiny[1], 100, "drawing")))
            await asyncio.sleep(0.03)
            pipeline.head.lose("a test says so")
            began = time.monotonic()
            lost = await asyncio.gather(drawing, last_of(pipeline, request(tiny[1], 150, "refused nothing")))
            assert all(isinstance(event, FailedEvent) and event.kind == "deadline" for event in lost)
            assert time.monotonic() - began < 2

    asyncio.run(main())


def test_it_is_absolute_the_next_head_is_told_what_is_left_of_it(tiny: Tiny) -> None:
    """Also without a next Head: the ingress alone ends it then."""

    async def main() -> None:
        async with house(tiny) as pipeline:
            heard: list[GenerationRequest] = []
            submit = pipeline.head.submit

            def listening(asked: GenerationRequest, *rest: object) -> bytes:
                heard.append(asked)
                return submit(asked, *rest)  # type: ignore[arg-type]

            pipeline.head.submit = listening  # type: ignore[method-assign]
            server = HeadServer(pipeline.head, dict)
            where = [await server.listen(LOOPBACK)]

            async def locate() -> LinkAddress:
                if not where:
                    raise PipelineError("nowhere")
                return where[-1]

            client = HeadClient(locate)
            client.start()
            while client._link is None:
                await asyncio.sleep(0.01)
            answer = Answer(client, request(tiny[1], 1500), BytesText().decoder(), ())
            began = time.monotonic()
            await answer.start()
            pipeline.head.lose("a test says so")  # it draws no more, and waits
            where.clear()
            server.close()
            await asyncio.sleep(0.3)
            successor = HeadServer(pipeline.head, dict)
            where.append(await successor.listen(LOOPBACK))
            while len(heard) < 2:
                await asyncio.sleep(0.01)
            assert heard[0].timeout_ms and heard[1].timeout_ms and heard[1].timeout_ms <= heard[0].timeout_ms - 300
            where.clear()
            successor.close()
            with pytest.raises(DeadlineError):
                [piece async for piece in answer.pieces()]
            assert 1.4 < time.monotonic() - began < 3
            await answer.close()
            client.close()

    asyncio.run(main())


def test_one_whose_receipt_alone_lacks_when_stages_are_lost_ends_too(tiny: Tiny) -> None:
    """Its deadline came while the stages signed; now they would have to run it again."""

    async def main() -> None:
        async with house(tiny) as pipeline:
            head, heard = pipeline.head, asyncio.Queue[Event]()
            deliver = head.deliver
            head.deliver = lambda data: None if head._running and at_the_end() else deliver(data)  # type: ignore[method-assign]

            def at_the_end() -> bool:
                return next(iter(head._running.values())).reason is not None

            head.submit(request(tiny[1], 100, tokens=3), heard.put_nowait)
            for _ in range(3):
                assert isinstance(await heard.get(), TokensEvent)
            await asyncio.sleep(0.15)
            assert heard.empty()  # it was let go on: the word to sign may be on its way
            head.lose("a test says so")
            head.resume()
            last = await heard.get()
            assert isinstance(last, FailedEvent) and last.kind == "deadline"

    asyncio.run(main())
