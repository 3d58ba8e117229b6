"""An ingress and a Head over a real socket on loopback: strangers, deaths on either side, and the way back."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serve_app.engine.load import LoadOptions
from serve_app.errors import OverloadedError, PipelineError, ProtocolError, ReplacedError, RequestError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.events import MAX_RESUMED, Begun
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
from serve_app.receipts.check import Expected, check
from serve_app.transport.link import LinkAddress, accept, connect
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

Tiny = tuple[MemoryStore, Manifest]
PAGES = 64


@asynccontextmanager
async def house(
    tiny: Tiny, wait_s: float = 10, **limits: int
) -> AsyncIterator[tuple[LocalPipeline, HeadServer, HeadClient, list[LinkAddress]]]:
    """A pipeline whose Head listens, and a client that finds it through `where` (its last entry)."""
    store, manifest = tiny
    options = LoadOptions("cpu", "float32", 4, None)
    sizes = LocalLimits(**({"n_pages": PAGES} | limits))
    pipeline = LocalPipeline(store, manifest, stages=1, options=options, limits=sizes)
    await pipeline.warm_up()
    server = HeadServer(pipeline.head, lambda: {"ready": True, "pipelines": [pipeline.head.status()]})
    where = [await server.listen(LOOPBACK)]

    async def locate() -> LinkAddress:
        if not where:
            raise PipelineError("nowhere")
        return where[-1]

    client = HeadClient(locate, wait_s)
    client.start()
    try:
        await until(client.ready)
        yield pipeline, server, client, where
    finally:
        client.close()
        server.close()
        pipeline.close()


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.01)


def request(manifest: Manifest, name: str = "r", tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(
        RequestId(name), manifest.cid, (5, 6, 7), tokens, Sampling(0), (), b"", secrets.token_bytes(32)
    )


async def events(client: HeadClient, asked: GenerationRequest) -> list[Event]:
    return [event async for event in client.generate(asked)]


def test_an_answer_comes_over_the_socket_with_its_receipt(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (_, _, client, _):
            got = await events(client, request(tiny[1]))
            assert isinstance(got[-1], FinishedEvent) and got[-1].receipt
            assert client.status()["ready"] is True

    asyncio.run(main())


def test_a_full_pipeline_says_so_to_the_caller(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny, max_waiting=0, max_running=1) as (_, _, client, _):
            stream = client.generate(request(tiny[1], "long", tokens=200))
            await anext(stream)
            with pytest.raises(OverloadedError):
                await events(client, request(tiny[1]))
            await stream.aclose()

    asyncio.run(main())


def test_a_stranger_is_not_let_in_and_does_not_believe_an_impostor(tiny: Tiny) -> None:
    """Wrong secret: neither side accepts the other."""

    async def main() -> None:
        async with house(tiny) as (_, _, _, where):
            with pytest.raises(PipelineError, match="no pipeline head answers"):
                await connect(replace(where[0], secret=bytes(32)), 1000, timeout_s=2)

    asyncio.run(main())


def test_a_peer_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.transport.link._HANDSHAKE_S", 0.1)

    async def main() -> None:
        dropped = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await accept(reader, writer, bytes(32), 1000) is None
            dropped.set()

        server = await asyncio.start_server(serve, LOOPBACK, 0)
        _, writer = await asyncio.open_connection(LOOPBACK, server.sockets[0].getsockname()[1])
        await asyncio.wait_for(dropped.wait(), 5)
        writer.close()
        server.close()

    asyncio.run(main())


def test_a_caller_that_sends_too_large_a_frame_or_noise_is_cut_off_and_others_go_on(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (_, _, client, where):
            for frame in (b"noise", bytes(17 << 20)):
                rude = await connect(where[0], 1000)
                rude.send(frame)
                assert await asyncio.wait_for(rude.receive(), 5) is None
            assert isinstance((await events(client, request(tiny[1])))[-1], FinishedEvent)

    asyncio.run(main())


def test_an_ingress_that_dies_has_its_requests_cancelled(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (pipeline, _, client, _):
            stream = client.generate(request(tiny[1], tokens=200))
            await anext(stream)
            assert client._link is not None
            client._link.close()
            client.close()

            async def idle() -> bool:
                return pipeline.head.status()["free_pages"] == PAGES

            await until(idle)
            last = [event async for event in stream][-1]
            assert isinstance(last, FailedEvent) and "shutting down" in last.message

    asyncio.run(main())


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(900_000)], ids=["greedy", "random"])
@pytest.mark.parametrize("at", [1, 7, 39])
def test_a_request_goes_on_with_the_next_head_behind_the_tokens_it_has(tiny: Tiny, sampling: Sampling, at: int) -> None:
    """Every token once and in order, drawn with the noise it began with; the receipt is of all of them."""

    async def main() -> None:
        async with house(tiny) as (pipeline, server, client, where):
            asked = replace(request(tiny[1], tokens=40), sampling=sampling)
            stream, tokens = client.generate(asked), list[int]()
            while len(tokens) < at:
                event = await anext(stream)
                assert isinstance(event, TokensEvent)
                tokens += event.tokens
            where.clear()
            server.close()
            successor = HeadServer(pipeline.head, lambda: {"ready": True, "pipelines": []})
            where.append(await successor.listen(LOOPBACK))
            rest = [event async for event in stream]
            assert all(event.id == asked.id for event in rest) and isinstance(rest[-1], FinishedEvent)
            tokens += [token for event in rest if isinstance(event, TokensEvent) for token in event.tokens]
            expected = Expected(out_ids=tuple(tokens), prompt_ids=asked.prompt_ids)
            checked = check(rest[-1].receipt, pipeline.operator.public, now_s=int(time.time()), request=expected)
            assert len(tokens) == 40 and checked.receipt.attempt == 1024
            if not sampling.temperature_micro:
                undisturbed = [event async for event in pipeline.generate(replace(asked, id=RequestId("alone")))]
                alone = [token for event in undisturbed if isinstance(event, TokensEvent) for token in event.tokens]
                assert tokens == alone
            successor.close()

    asyncio.run(main())


def test_one_that_had_come_to_its_end_is_given_its_receipt_by_the_next_head(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (pipeline, _, _, _):
            whole = [event async for event in pipeline.generate(request(tiny[1], tokens=6))]
            drawn = tuple(token for event in whole if isinstance(event, TokensEvent) for token in event.tokens)
            heard: asyncio.Queue[Event] = asyncio.Queue()
            begun = Begun(drawn[:4], True, bytes(32), 1)
            pipeline.head.submit(request(tiny[1], "stopped"), heard.put_nowait, begun)
            last = await asyncio.wait_for(heard.get(), 5)
            assert isinstance(last, FinishedEvent) and last.reason == "stop"
            checked = check(last.receipt, pipeline.operator.public, now_s=int(time.time()))
            assert checked.receipt.out_ids == drawn[:4]

    asyncio.run(main())


def test_without_a_next_head_requests_end_in_time_and_new_ones_are_refused_with_the_reason(
    tiny: Tiny,
) -> None:
    async def main() -> None:
        async with house(tiny, wait_s=0.5) as (_, server, client, where):
            stream = client.generate(request(tiny[1], tokens=200))
            await anext(stream)
            where.clear()
            server.close()
            last = [event async for event in stream][-1]
            assert isinstance(last, FailedEvent) and "no pipeline is there after" in last.message
            with pytest.raises(PipelineError, match="no pipeline is ready"):
                await events(client, request(tiny[1], "again"))

    asyncio.run(main())


def test_what_no_head_can_have_begun_is_refused(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (pipeline, _, _, _):
            for drawn in ((5,) * 6, (1 << 20,)):
                with pytest.raises(RequestError):
                    pipeline.head.submit(request(tiny[1]), print, Begun(drawn, False, bytes(32), 1))
            for times, stopped in ((0, False), (MAX_RESUMED + 1, False), (1, True)):
                with pytest.raises(ProtocolError):
                    Begun((), stopped, bytes(32), times)

    asyncio.run(main())


def test_what_a_newer_version_replaces_ends_what_runs_takes_nothing_new_and_goes_on_with_what_had_begun(
    tiny: Tiny,
) -> None:
    async def main() -> None:
        async with house(tiny) as (pipeline, _, client, _):
            stream = client.generate(request(tiny[1], "runs", tokens=20))
            await anext(stream)
            assert pipeline.head.drain(True) == 1
            with pytest.raises(OverloadedError, match="newer version"):
                await events(client, request(tiny[1], "new"))
            begun: asyncio.Queue[Event] = asyncio.Queue()
            pipeline.head.submit(request(tiny[1], "moved"), begun.put_nowait, Begun((5,), False, bytes(32), 1))
            assert isinstance([event async for event in stream][-1], FinishedEvent)
            while not isinstance(event := await asyncio.wait_for(begun.get(), 5), FinishedEvent):
                assert isinstance(event, TokensEvent)
            assert pipeline.head.drain(False) == 0
            assert isinstance((await events(client, request(tiny[1], "again")))[-1], FinishedEvent)

    asyncio.run(main())


def test_a_version_that_was_replaced_keeps_nobody_waiting(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (_, server, _, where):
            replaced = False

            async def locate() -> LinkAddress:
                if replaced:
                    raise ReplacedError("a newer version has taken this one's place")
                return where[-1]

            client = HeadClient(locate, wait_s=60)
            client.start()
            await until(client.ready)
            stream = client.generate(request(tiny[1], tokens=200))
            await anext(stream)
            replaced = True
            server.close()
            async with asyncio.timeout(5):
                last = [event async for event in stream][-1]
            assert isinstance(last, FailedEvent) and "newer version" in last.message
            client.close()

    asyncio.run(main())


def test_an_error_that_nobody_foresaw_does_not_end_the_search_for_the_head(tiny: Tiny) -> None:
    async def main() -> None:
        async with house(tiny) as (_, _, _, where):
            errors: list[Exception] = [ValueError("of a library"), RuntimeError()]

            async def locate() -> LinkAddress:
                if errors:
                    raise errors.pop()
                return where[-1]

            client = HeadClient(locate, wait_s=60)
            client.start()
            await until(client.ready)
            client.close()

    asyncio.run(main())
