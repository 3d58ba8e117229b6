"""An ingress and a Head over a real socket on loopback: strangers, deaths on either side, and the way back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from serve_app.engine.load import LoadOptions
from serve_app.errors import OverloadedError, PipelineError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import Event, FailedEvent, FinishedEvent, GenerationRequest, RequestId, Sampling
from serve_app.pipeline.head_client import HeadClient
from serve_app.pipeline.head_server import LOOPBACK, HeadServer
from serve_app.transport.link import LinkAddress, accept, connect
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

Tiny = tuple[MemoryStore, Manifest]
PAGES = 64


@asynccontextmanager
async def house(
    tiny: Tiny, **limits: int
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

    client = HeadClient(locate)
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
            for frame in (b"noise", bytes(9 << 20)):
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

            async def idle() -> bool:
                return pipeline.head.status()["free_pages"] == PAGES

            await until(idle)
            last = [event async for event in stream][-1]
            assert isinstance(last, FailedEvent) and last.kind == "pipeline"

    asyncio.run(main())


def test_when_the_head_dies_requests_end_and_its_successor_is_found(tiny: Tiny) -> None:
    """No reader waits for ever; while there is no Head, requests are refused with the reason."""

    async def main() -> None:
        async with house(tiny) as (pipeline, server, client, where):
            stream = client.generate(request(tiny[1], tokens=200))
            await anext(stream)
            where.clear()
            server.close()
            last = [event async for event in stream][-1]
            assert isinstance(last, FailedEvent) and last.kind == "pipeline"
            with pytest.raises(PipelineError, match="no pipeline is ready"):
                await events(client, request(tiny[1], "again"))
            successor = HeadServer(pipeline.head, lambda: {"ready": True, "pipelines": []})
            where.append(await successor.listen(LOOPBACK))
            await until(client.ready)
            assert isinstance((await events(client, request(tiny[1], "after")))[-1], FinishedEvent)
            successor.close()

    asyncio.run(main())
