"""Both ends of every kind of edge, in one process or with the far end in another, for the contract suite.

Run as a module, it is the far end: `python -m tests.contracts.edge_pairs KIND ROLE PARENT`. Its first line of standard
input is the address to dial, if it sends; what it sees goes to standard output, a line each.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from serve_app.transport.edge import Edge, LocalEdge, Lost
from serve_app.transport.handshake import EdgeAddress, EdgeKind, Inlet, Outlet, Peer
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from serve_app.transport.tcp import dial_tcp
from shard_tools.signing import Signer

EPOCH = 7
HERE, THERE, STRANGER = (Signer.from_seed(bytes([i]) * 32) for i in (1, 2, 3))
KINDS: tuple[EdgeKind, ...] = ("shared_memory", "tcp")


def credentials(signer: Signer) -> bytes:
    return signer.certify_tls(int(time.time()), 600)


def inlet(kind: EdgeKind, pid: int, deliver: Callable[[bytes], None], lost: Lost, signer: Signer = THERE) -> Inlet:
    """Awaits the edge `e` from process pid."""
    return Inlet("e", kind, Peer("the sender", signer.public, pid), deliver, lost)


def outlet(kind: EdgeKind, pid: int, address: EdgeAddress, signer: Signer = HERE) -> Outlet:
    """Leads to process pid."""
    return Outlet("e", kind, Peer("the receiver", signer.public, pid), address)


def dial(to: Outlet, lost: Lost, signer: Signer = THERE, epoch: int = EPOCH) -> Edge:
    if to.kind == "tcp":
        return dial_tcp(to, epoch, credentials(signer), lost)
    return dial_shared_memory(to, epoch, lost)


@dataclass
class Losses:
    """What `lost` was told, and when."""

    told: queue.Queue[tuple[str, str, float]] = field(default_factory=queue.Queue)

    def __call__(self, peer: str, why: str) -> None:
        self.told.put((peer, why, time.monotonic()))

    def first(self, timeout_s: float = 5.0) -> tuple[str, str, float]:
        return self.told.get(timeout=timeout_s)


@dataclass
class Pair:
    """An open edge whose messages come out of `received`."""

    edge: Edge
    received: queue.Queue[bytes]
    lost_receiver: Losses  # as the sender saw it
    lost_sender: Losses
    close_receiver: Callable[[], None]


@contextmanager
def pair(kind: str, room: int = 0) -> Iterator[Pair]:
    """Both ends here. room: messages the receiver takes before it blocks; 0: any number."""
    received: queue.Queue[bytes] = queue.Queue(room)
    lost_receiver, lost_sender = Losses(), Losses()
    if kind == "local":
        yield Pair(LocalEdge(received.put), received, lost_receiver, lost_sender, lambda: None)
        return
    if kind == "ray":
        from tests.contracts.ray_pair import ray_pair

        with ray_pair() as (by_ray, taken, _):
            yield Pair(by_ray, taken, lost_receiver, lost_sender, lambda: None)
        return
    assert kind in KINDS
    inlets = [inlet(kind, os.getpid(), received.put, lost_sender)]
    listener = EdgeListener(EPOCH, inlets, "127.0.0.1", credentials(HERE))
    edge = dial(outlet(kind, os.getpid(), listener.address), lost_receiver)
    try:
        yield Pair(edge, received, lost_receiver, lost_sender, listener.close)
    finally:
        edge.close()
        while not received.empty():
            received.get_nowait()
        listener.close()


class FarEnd:
    """A real process at the other end. Roles: `count` takes all in, `stall` the first, `send` sends what it is told."""

    def __init__(self, kind: EdgeKind, role: str) -> None:
        command = [sys.executable, "-m", "tests.contracts.edge_pairs", kind, role, str(os.getpid())]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=root, start_new_session=True)
        self.pid = self.process.pid

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def address(self) -> EdgeAddress:
        return EdgeAddress(**json.loads(self.hear()))

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)  # its heartbeat helper too: a stopped one does not see its owner's end
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def _main(kind: EdgeKind, role: str, parent: int) -> None:
    def say(line: str) -> None:
        print(line, flush=True)

    def lost(peer: str, why: str) -> None:
        say(f"lost: {why}")

    if role == "send":
        address = EdgeAddress(**json.loads(sys.stdin.readline()))
        edge = dial(outlet(kind, parent, address), lost)
        for line in sys.stdin:
            match line.split():
                case ["send", n]:
                    edge.send(bytes(int(n)))
                case ["hold-gil", seconds]:
                    hold_the_lock(float(seconds))
                case ["close"]:
                    edge.close()
            say("done")
        return

    stalled = threading.Event()

    def deliver(message: bytes) -> None:
        say(f"{len(message)} {hashlib.sha256(message).hexdigest()}")
        if role == "stall":
            stalled.wait()

    listener = EdgeListener(EPOCH, [inlet(kind, parent, deliver, lost)], "127.0.0.1", credentials(HERE))
    say(json.dumps(asdict(listener.address)))
    for line in sys.stdin:
        match line.split():
            case ["hold-gil", seconds]:
                hold_the_lock(float(seconds))
            case ["close"]:
                listener.close()
        say("done")


def hold_the_lock(seconds: float) -> None:
    """Sleep in C without letting any other Python thread run."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))  # type: ignore[arg-type]
