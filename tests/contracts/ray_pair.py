"""An edge of Ray's actor calls, to an actor in a real Ray, for the contract suite."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from serve_app.cluster.ray_edge import InOrder, RayEdge


class Sink:
    """Takes messages in, and gives them back to who asks."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._in_order = InOrder(self._messages.put_nowait)

    async def push(self, edge: str, number: int, message: bytes) -> None:
        self._in_order.take(number, message)

    async def take(self) -> bytes:
        return await self._messages.get()

    async def pid(self) -> int:
        return os.getpid()


@contextmanager
def ray_pair() -> Iterator[tuple[RayEdge, queue.Queue[bytes], int]]:
    """The sending end, what came out of the other one, and the process that is the other one."""
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    received: queue.Queue[bytes] = queue.Queue()
    try:
        sink: Any = ray.remote(num_cpus=0, max_restarts=0)(Sink).remote()
        pid: int = ray.get(sink.pid.remote())

        def pump() -> None:
            try:
                while True:
                    received.put(ray.get(sink.take.remote()))
            except (Exception, SystemExit):
                return  # the actor has ended, or Ray, which says so by SystemExit

        threading.Thread(target=pump, daemon=True).start()
        edge = RayEdge(sink, "e")
        yield edge, received, pid
        edge.close()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
