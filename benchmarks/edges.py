"""What does one hop between two stages cost, by kind of edge and size of message? Two real processes.

    python -m benchmarks.edges [--kinds shared_memory tcp ray] [--rounds 300]

A message goes to the other process and comes back over a second edge of the same kind, as a step goes down and its
tokens come up; one way is half of that. Neither side computes or spins; median and tenth percentile, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Result, save
from serve_app.transport.edge import Edge
from serve_app.transport.handshake import EdgeAddress, EdgeKind, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from serve_app.transport.tcp import dial_tcp
from shard_tools.signing import Signer

SIZES = {"8_KiB": 8 << 10, "64_KiB": 64 << 10, "512_KiB": 512 << 10, "4_MiB": 4 << 20}
EPOCH = 1
RoundTrips = Callable[[int, int], list[float]]  # (size, rounds) -> seconds of each
KEYS = {"there": Signer.from_seed(bytes(32)), "back": Signer.from_seed(b"\1" * 32)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["shared_memory", "tcp", "ray"])
    parser.add_argument("--rounds", type=int, default=300, help="of small messages; of 4 MiB a tenth")
    parser.add_argument("--echo", nargs=2, metavar=("KIND", "PID"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.echo:
        echo(a.echo[0], int(a.echo[1]))
        return 0
    figures: dict[str, Any] = {}
    for kind in a.kinds:
        with ray_pair() if kind == "ray" else own_pair(kind) as measured:
            for name, size in SIZES.items():
                times = measured(size, a.rounds if size < 1 << 20 else a.rounds // 10)
                median, fast = statistics.median(times), statistics.quantiles(times, n=10)[0]
                figures[f"{kind}_{name}_round_trip_us"] = round(median * 1e6, 1)
                figures[f"{kind}_{name}_round_trip_p10_us"] = round(fast * 1e6, 1)
                figures[f"{kind}_{name}_one_way_us"] = round(median / 2 * 1e6, 1)
    save(Result("edges", figures))
    return 0


def round_trips(edge: Edge, replies: queue.SimpleQueue[bytes], size: int, rounds: int) -> list[float]:
    """Seconds of each; the first ten do not count."""
    plan, rows = bytes(100), memoryview(os.urandom(size - 100))
    times = []
    for _ in range(rounds + 10):
        began = time.perf_counter()
        edge.send(plan, rows)
        reply = replies.get()
        times.append(time.perf_counter() - began)
    assert reply == plan + bytes(rows)
    return times[10:]


@contextmanager
def own_pair(kind: EdgeKind) -> Iterator[RoundTrips]:
    replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    command = [sys.executable, "-m", "benchmarks.edges", "--echo", kind, str(os.getpid())]
    other = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=Path(__file__).parents[1])
    listener = listen(kind, "back", other.pid, replies.put)
    edge = None
    try:
        tell(other.stdin, listener.address)
        edge = dial(kind, "there", other.pid, hear(other.stdout))
        yield partial(round_trips, edge, replies)
    finally:
        if edge is not None:
            edge.close()
        other.kill()
        other.wait()
        listener.close()


def echo(kind: EdgeKind, parent: int) -> None:
    """The other process: sends back whatever comes."""
    back: queue.SimpleQueue[Edge] = queue.SimpleQueue()
    held: list[Edge] = []

    def deliver(message: bytes) -> None:
        if not held:
            held.append(back.get())
        held[0].send(message)

    listener = listen(kind, "there", parent, deliver)
    tell(sys.stdout, listener.address)
    back.put(dial(kind, "back", parent, hear(sys.stdin)))
    threading.Event().wait()


def listen(kind: EdgeKind, edge: str, pid: int, deliver: Callable[[bytes], None]) -> EdgeListener:
    inlet = Inlet(edge, kind, Peer("the other process", KEYS[edge].public, pid), deliver, lambda peer, why: None)
    return EdgeListener(EPOCH, [inlet], "127.0.0.1", credentials(edge))


def dial(kind: EdgeKind, edge: str, pid: int, address: EdgeAddress) -> Edge:
    outlet = Outlet(edge, kind, Peer("the other process", KEYS[edge].public, pid), address)
    if kind == "tcp":
        return dial_tcp(outlet, EPOCH, credentials(edge), lambda peer, why: None)
    return dial_shared_memory(outlet, EPOCH, lambda peer, why: None)


def credentials(edge: str) -> bytes:
    return KEYS[edge].certify_tls(int(time.time()), 3600)  # one key for both ends of an edge: nobody else is here


def tell(stream: Any, address: EdgeAddress) -> None:
    print(address.path or "-", address.host, address.port or 0, file=stream, flush=True)


def hear(stream: Any) -> EdgeAddress:
    path, host, port = stream.readline().split()
    return EdgeAddress(None if path == "-" else path, host, int(port) or None)


@contextmanager
def ray_pair() -> Iterator[RoundTrips]:
    """Two actors; the first one is driven from here, so its own calls are what is timed."""
    import ray

    from serve_app.cluster.ray_edge import RayEdge

    class Echo:
        async def meet(self, to: Any) -> None:
            self._edge = RayEdge(to, "back")

        async def push(self, edge: str, number: int, message: bytes) -> None:
            self._edge.send(message)

    class Asker(Echo):
        def __init__(self) -> None:
            self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        async def push(self, edge: str, number: int, message: bytes) -> None:
            self._replies.put(message)

        async def ask(self, size: int, rounds: int) -> list[float]:
            return await asyncio.to_thread(round_trips, self._edge, self._replies, size, rounds)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        one, other = (ray.remote(num_cpus=0)(kind).remote() for kind in (Asker, Echo))
        ray.get([one.meet.remote(other), other.meet.remote(one)])
        yield lambda size, rounds: ray.get(one.ask.remote(size, rounds))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
