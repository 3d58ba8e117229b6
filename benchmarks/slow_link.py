"""What does a slow link between two stages cost? Two stages in one process, TLS between them by a proxy that waits.

    python -m benchmarks.slow_link [--model tiny] [--delays 0 50 200] [--jitter 0.5] [--streams 1 8] [--tokens 40]

Milliseconds one way; jitter: each piece waits so much of the delay more or less, in order. Only rows from stage 0 to
stage 1 go that way, and tokens come back at once. One stream's answer must be that without a delay (of several the rows
meet others in a step, and may differ in their last bits), and no edge may be lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.models import greedy, published, random_prompt
from benchmarks.report import Result, save
from serve_app.local import LocalPipeline
from serve_app.messages.request import FinishedEvent, TokensEvent
from serve_app.transport.handshake import EdgeAddress, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.tcp import dial_tcp
from shard_tools.manifest import Manifest
from shard_tools.signing import Signer

_EPOCH, _SEED = 1, 7
_PIECE = 64 << 10


class SlowLink:
    """A port of loopback that leads to another one, and takes its time both ways; what waits keeps its order."""

    def __init__(self, to: int, delay_s: float, jitter: float) -> None:
        """jitter: each piece waits `delay_s` times 1 - jitter to 1 + jitter."""
        self._to, self._delay_s, self._jitter = to, delay_s, jitter
        self._draw = random.Random(_SEED)
        self._open: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        threading.Thread(target=self._accept_all, name="slow link", daemon=True).start()

    def close(self) -> None:
        """Nothing goes through any more."""
        for each in (self._door, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept_all(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for here, there in ((near, far), (far, near)):
                    on_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    threading.Thread(target=self._take, args=(here, on_way), daemon=True).start()
                    threading.Thread(target=self._give, args=(there, on_way), daemon=True).start()

    def _take(self, here: socket.socket, on_way: queue.Queue[tuple[float, bytes]]) -> None:
        piece = b"-"
        while piece:
            try:
                piece = here.recv(_PIECE)
            except OSError:
                piece = b""
            wait_s = self._delay_s * (1 + self._jitter * self._draw.uniform(-1, 1))
            on_way.put((time.monotonic() + wait_s, piece))

    def _give(self, there: socket.socket, on_way: queue.Queue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due_s, piece = on_way.get()
                time.sleep(max(0.0, due_s - time.monotonic()))
                if not piece:
                    there.shutdown(socket.SHUT_WR)
                    return
                there.sendall(piece)


@contextmanager
def far_apart(
    pipeline: LocalPipeline, delay_s: float, jitter: float, lost: Callable[[str, str], None]
) -> Iterator[None]:
    """Its second stage is at the other end of a slow link. lost: told if either end takes the other for dead."""
    near, far = Signer.fresh(), Signer.fresh()

    def credentials(who: Signer) -> bytes:
        return who.certify_tls(int(time.time()), 3600)

    first, second = pipeline.stages
    inlet = Inlet("rows", "tcp", Peer("stage 0", near.public, os.getpid()), second.deliver, lost)
    listener = EdgeListener(_EPOCH, [inlet], "127.0.0.1", credentials(far))
    assert listener.address.port is not None
    link = SlowLink(listener.address.port, delay_s, jitter)
    where = EdgeAddress(None, "127.0.0.1", link.port)
    edge = dial_tcp(
        Outlet("rows", "tcp", Peer("stage 1", far.public, os.getpid()), where), _EPOCH, credentials(near), lost
    )
    before, first._next = first._next, edge
    try:
        yield
    finally:
        first._next = before
        edge.close()
        listener.close()
        link.close()


async def answers(pipeline: LocalPipeline, manifest: Manifest, streams: int, tokens: int) -> list[tuple[int, ...]]:
    """What so many requests at once are answered, the same at each call. Raises RuntimeError for one that fails."""
    draw = random.Random(_SEED)

    async def ask(prompt: tuple[int, ...]) -> tuple[int, ...]:
        events = [event async for event in pipeline.generate(greedy(manifest, prompt, tokens))]
        if not isinstance(events[-1], FinishedEvent):
            raise RuntimeError(f"a request failed: {events[-1]}")
        return tuple(token for event in events if isinstance(event, TokensEvent) for token in event.tokens)

    return list(await asyncio.gather(*(ask(random_prompt(draw, manifest, 24)) for _ in range(streams))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="tiny")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 50, 200], help="milliseconds, one way")
    parser.add_argument("--jitter", type=float, default=0.5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(Path(folder), a))
    save(Result("slow_link", {"model": a.model, "jitter": a.jitter, **figures}), a.out)
    return 1 if figures["edges_lost"] or figures["answers_differ"] else 0


async def measure(folder: Path, a: argparse.Namespace) -> dict[str, Any]:
    model = published(folder, a.model)
    pipeline = model.pipeline(2)
    figures: dict[str, Any] = {}
    losses: list[tuple[str, str]] = []
    different = 0
    try:
        await pipeline.warm_up()
        for streams in a.streams:
            expected = await answers(pipeline, model.manifest, streams, a.tokens)
            for delay in a.delays:
                with far_apart(pipeline, delay / 1000, a.jitter, lambda peer, why: losses.append((peer, why))):
                    began = time.perf_counter()
                    got = await answers(pipeline, model.manifest, streams, a.tokens)
                    rate = streams * a.tokens / (time.perf_counter() - began)
                    different += streams == 1 and got != expected
                figures[f"{streams}_streams_{delay:g}_ms_tokens_per_s"] = round(rate, 1)
    finally:
        pipeline.close()
    return figures | {"answers_differ": different, "edges_lost": len(losses)}


if __name__ == "__main__":
    sys.exit(main())
