"""A request with an Idempotency-Key over a real socket: whoever asks again goes on, and tokens are drawn once."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serve_app.engine.load import LoadOptions
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
from serve_app.pipeline import keyed
from serve_app.pipeline.head_client import HeadClient
from serve_app.pipeline.head_server import LOOPBACK, HeadServer
from serve_app.receipts.check import Expected, check
from serve_app.transport.link import LinkAddress
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

Tiny = tuple[MemoryStore, Manifest]
PAGES = 256
TOKENS = 200


@asynccontextmanager
async def doors(tiny: Tiny, keep_s: float = 30.0) -> AsyncIterator[tuple[LocalPipeline, list[HeadClient], HeadServer]]:
    """A Head and two ingresses."""
    options = LoadOptions("cpu", "float32", 4, None)
    pipeline = LocalPipeline(*tiny, stages=1, options=options, limits=LocalLimits(PAGES))
    server = HeadServer(pipeline.head, dict, keep_s)
    address = await server.listen(LOOPBACK)

    async def locate() -> LinkAddress:
        return address

    clients = [HeadClient(locate) for _ in range(2)]
    try:
        for client in clients:
            client.start()
            await until(lambda client=client: client._link is not None)  # type: ignore[misc]
        async with asyncio.timeout(30):
            yield pipeline, clients, server
    finally:
        for client in clients:
            client.close()
        server.close()
        pipeline.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def request(manifest: Manifest, name: str, key: str = "k", asked: str = "a", **fields: object) -> GenerationRequest:
    once = Once(hashlib.sha256(key.encode()).digest(), hashlib.sha256(asked.encode()).digest())
    salt, sampling = secrets.token_bytes(32), Sampling(900_000)  # noise of the Head's own: another draw tells
    plain = GenerationRequest(RequestId(name), manifest.cid, (5, 6, 7), TOKENS, sampling, (), bytes(32), salt)
    return replace(plain, once=once, **fields)  # type: ignore[arg-type]


async def begin(client: HeadClient, asked: GenerationRequest, tokens: int = 5) -> tuple[object, list[int]]:
    """It runs and has told so many; the stream must be held."""
    stream, got = client.generate(asked), list[int]()
    while len(got) < tokens:
        event = await anext(stream)
        assert isinstance(event, TokensEvent)
        got += event.tokens
    return stream, got


async def whole(client: HeadClient, asked: GenerationRequest) -> tuple[list[int], Event]:
    events = [event async for event in client.generate(asked)]
    assert all(event.id == asked.id for event in events)
    return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens], events[-1]


HOW = ["the ingress dies", "the client hangs up", "the client hangs up, then the ingress dies", "nobody noticed"]


@pytest.mark.parametrize("how", HOW)
def test_a_retry_goes_on_behind_the_tokens_so_far_and_they_are_drawn_once(tiny: Tiny, how: str) -> None:
    async def main() -> None:
        async with doors(tiny) as (pipeline, (first, second), server):
            stream, told = await begin(first, request(tiny[1], "first"))
            if how == "the ingress dies":
                assert first._link is not None
                first._link.close()
                first.close()
            elif how != "nobody noticed":
                await stream.aclose()  # type: ignore[attr-defined]
            retried = request(tiny[1], "retried")
            answer = asyncio.create_task(whole(second, retried))
            if how == HOW[2]:
                await until(lambda: "retried" in server._requests._read)
                assert first._link is not None
                first._link.close()
                first.close()
            tokens, end = await answer
            assert tokens[: len(told)] == told and len(tokens) == TOKENS == pipeline.head.tokens_drawn
            assert isinstance(end, FinishedEvent) and pipeline.head.receipts_issued == 1
            expected = Expected(out_ids=tuple(tokens), prompt_ids=retried.prompt_ids)
            check(end.receipt, pipeline.operator.public, now_s=int(time.time()), request=expected)
            if how == "nobody noticed":
                last = [event async for event in stream][-1]  # type: ignore[attr-defined]
                assert isinstance(last, FailedEvent) and last.kind == "taken_over"
            again, same = await whole(second, request(tiny[1], "once more"))
            assert again == tokens and isinstance(same, FinishedEvent) and same.receipt == end.receipt
            assert pipeline.head.tokens_drawn == TOKENS

    asyncio.run(main())


def test_another_request_under_the_same_key_is_refused_and_under_another_key_runs(tiny: Tiny) -> None:
    async def main() -> None:
        async with doors(tiny) as (_, (first, second), _):
            stream, _ = await begin(first, request(tiny[1], "first"))
            _, refused = await whole(second, request(tiny[1], "other", asked="b"))
            assert isinstance(refused, FailedEvent) and refused.kind == "key_reused"
            tokens, _ = await whole(second, request(tiny[1], "elsewhere", key="l", asked="b"))
            assert len(tokens) == TOKENS
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_what_nobody_asks_for_again_is_forgotten_in_time_and_its_pages_are_back(tiny: Tiny) -> None:
    async def main() -> None:
        async with doors(tiny, keep_s=0.05) as (pipeline, (first, second), server):
            stream, _ = await begin(first, request(tiny[1], "first"))
            await stream.aclose()  # type: ignore[attr-defined]
            kept = server._requests
            await until(lambda: not (kept._by_key or kept._read or kept._unread or kept._answers))
            await until(lambda: pipeline.head.status()["free_pages"] == PAGES)
            assert pipeline.head.tokens_drawn < TOKENS
            _, end = await whole(second, request(tiny[1], "anew", asked="b"))
            assert isinstance(end, FinishedEvent)
            await until(lambda: not (kept._by_key or kept._answers) and kept._answers_bytes == 0)

    asyncio.run(main())


def test_beyond_its_room_the_oldest_are_forgotten(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "MAX_UNREAD", 2)

    async def main() -> None:
        async with doors(tiny) as (_, (first, second), server):
            kept = server._requests
            streams = [(await begin(first, request(tiny[1], f"r{i}", key=f"k{i}"), 1))[0] for i in range(4)]
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]
            await until(lambda: len(kept._by_key) == 2 and not kept._read)
            assert [entry.id for entry in kept._by_key.values()] == ["r2", "r3"]
            monkeypatch.setattr(keyed, "MAX_KEPT_BYTES", 1)
            for i in (2, 3):
                await whole(second, request(tiny[1], f"again{i}", key=f"k{i}"))
            assert not kept._by_key and kept._answers_bytes == 0

    asyncio.run(main())


def test_a_link_that_breaks_is_no_retry_its_ingress_goes_on_with_the_same_draw(tiny: Tiny) -> None:
    async def main() -> None:
        async with doors(tiny) as (pipeline, (first, _), server):
            stream, told = await begin(first, request(tiny[1], "first"))
            for link in list(server._links):
                link.close()
            rest = [event async for event in stream]  # type: ignore[attr-defined]
            tokens = told + [token for event in rest if isinstance(event, TokensEvent) for token in event.tokens]
            assert isinstance(rest[-1], FinishedEvent) and len(tokens) == TOKENS == pipeline.head.tokens_drawn

    asyncio.run(main())


def test_a_retry_has_a_time_of_its_own(tiny: Tiny) -> None:
    async def main() -> None:
        async with doors(tiny) as (_, (first, second), _):
            stream, _ = await begin(first, request(tiny[1], "first", timeout_ms=60), 1)
            await stream.aclose()  # type: ignore[attr-defined]
            tokens, end = await whole(second, request(tiny[1], "retried", timeout_ms=20_000))
            assert isinstance(end, FinishedEvent) and len(tokens) == TOKENS

    asyncio.run(main())
