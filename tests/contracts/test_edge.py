"""What every Edge keeps, whichever it is; and what those between processes keep besides, against real processes.

A death is asked for within a second by the design. The tests allow more: they share two cores with others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import random
import signal
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import PipelineError
from serve_app.messages.step import MAX_PAYLOAD_BYTES
from serve_app.transport import shared_memory
from serve_app.transport.handshake import HELLO_BYTES, EdgeAddress, EdgeKind, Hello
from serve_app.transport.listener import EdgeListener
from serve_app.transport.shared_memory import dial_shared_memory
from serve_app.transport.tls import tls_context
from shard_tools.signing import Signer
from tests.contracts.edge_pairs import (
    EPOCH,
    HERE,
    KINDS,
    STRANGER,
    THERE,
    FarEnd,
    Losses,
    credentials,
    dial,
    inlet,
    outlet,
    pair,
)

FOUND_S = 2.0
every_edge = pytest.mark.parametrize("kind", ["local", *KINDS, pytest.param("ray", marks=pytest.mark.ray)])
between_processes = pytest.mark.parametrize("kind", KINDS)
slow = pytest.mark.slow


def endings(hard: object, easy: object) -> list[Any]:
    """The hardest case is in the fast suite: a peer that is stopped while messages wait."""
    others = [(signal.SIGSTOP, easy), (signal.SIGKILL, hard), (signal.SIGKILL, easy)]
    return [(signal.SIGSTOP, hard), *(pytest.param(*case, marks=slow) for case in others)]


FarEnds = Callable[[EdgeKind, str], FarEnd]


@pytest.fixture
def far_end() -> Iterator[FarEnds]:
    ends: list[FarEnd] = []

    def start(kind: EdgeKind, role: str) -> FarEnd:
        ends.append(FarEnd(kind, role))
        return ends[-1]

    yield start
    for end in ends:
        end.end()


@every_edge
def test_messages_of_any_size_arrive_whole_and_in_order(kind: str) -> None:
    """With nothing in them, with rows, larger than a TLS record, than the socket's inline bytes, than the ring."""
    rng = random.Random(1)
    sizes = [0, 1, 12, 16383, 16384, 16385, 65536, *(rng.randrange(300_000) for _ in range(60)), 5 << 20, 20 << 20, 3]
    sent: list[bytes] = []
    with pair(kind) as p:
        for size in sizes:
            message = rng.randbytes(size)
            cut = rng.randrange(size + 1)
            rows = message[cut:]
            p.edge.send(message[:cut], rng.choice((rows, memoryview(rows), memoryview(bytearray(rows)))))
            sent.append(message)
        for message in sent:
            assert p.received.get(timeout=10) == message


@every_edge
def test_rows_need_not_be_bytes(kind: str) -> None:
    """An engine gives them as an array of numbers, also of none."""
    with pair(kind) as p:
        p.edge.send(b"plan", memoryview(struct.pack("<4f", 1, 2, 3, 4)).cast("f"))
        p.edge.send(b"plan", memoryview(b""))
        assert p.received.get(timeout=5) == b"plan" + struct.pack("<4f", 1, 2, 3, 4)
        assert p.received.get(timeout=5) == b"plan"


@between_processes
@pytest.mark.parametrize("size", [100, 40_000, 3 << 20])
def test_a_sender_waits_for_a_receiver_that_is_behind(kind: EdgeKind, size: int) -> None:
    """Bounded by bytes: what waits between the two is less than 32 MiB, and nothing of it is lost."""
    n = 32 + (48 << 20) // size if size > 1000 else 200_000
    with pair(kind, room=1) as p:
        sent = 0

        def send_all() -> None:
            nonlocal sent
            with contextlib.suppress(PipelineError):  # it is closed below
                for i in range(n):
                    p.edge.send(i.to_bytes(4, "little"), bytes(size - 4))
                    sent += 1

        thread = threading.Thread(target=send_all, daemon=True)
        thread.start()
        before = -1
        while sent != before:
            before = sent
            time.sleep(0.1)
        assert sent < n and sent * size < 32 << 20
        got = 2000 if size < 1000 else n
        for i in range(got):
            assert p.received.get(timeout=10)[:4] == i.to_bytes(4, "little")
        if got == n:
            thread.join(5)
            assert sent == n
        p.edge.close()  # also while it blocks in send
        while thread.is_alive():
            with_patience(p.received)
        thread.join(5)


def with_patience(received: queue.Queue[bytes]) -> None:
    try:
        received.get(timeout=0.1)
    except queue.Empty:
        pass


@between_processes
def test_closing_is_no_loss_and_what_was_sent_before_arrives(kind: EdgeKind) -> None:
    """The sender closes: the receiver hears of no death. A send after it is refused."""
    with pair(kind) as p:
        for i in range(20):
            p.edge.send(b"%d" % i)
        p.edge.close()
        p.edge.close()
        assert [p.received.get(timeout=5) for _ in range(20)] == [b"%d" % i for i in range(20)]
        with pytest.raises(PipelineError, match="closed"):
            p.edge.send(b"")
        time.sleep(0.3)
        assert p.lost_sender.told.empty() and p.lost_receiver.told.empty()


@between_processes
def test_a_receiver_that_closes_is_a_loss_for_its_sender(kind: EdgeKind) -> None:
    with pair(kind) as p:
        p.close_receiver()
        peer, _, _ = p.lost_receiver.first()
        assert peer == "the receiver"
        with pytest.raises(PipelineError, match="the receiver is gone"):
            p.edge.send(b"x" * 100_000)
        assert p.lost_receiver.told.empty(), "told twice"


@between_processes
@pytest.mark.parametrize(("how", "size"), endings(1 << 20, 0))
def test_a_receiver_that_dies_or_stops_is_found(
    kind: EdgeKind, how: signal.Signals, size: int, far_end: FarEnds
) -> None:
    """Whether the sender is idle (size 0) or blocks on a peer that takes nothing in: told once, and send raises.

    The owner holds a lock while it sends, and takes it when it hears of the loss.
    """
    end, lost, owner = far_end(kind, "stall"), Losses(), threading.Lock()
    failed: queue.Queue[PipelineError] = queue.Queue()

    def hear(peer: str, why: str) -> None:
        with owner:
            lost(peer, why)

    edge = dial(outlet(kind, end.pid, end.address()), hear)

    def send_on() -> None:
        try:
            while True:
                with owner:
                    edge.send(bytes(size))
        except PipelineError as e:
            failed.put(e)

    if size:
        threading.Thread(target=send_on, daemon=True).start()
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(end.pid, how)
    peer, why, at = lost.first()
    assert at - began < FOUND_S and peer == "the receiver"
    assert how == signal.SIGKILL or "stopped" in why
    if not size:
        send_on()
    assert "the receiver is gone" in str(failed.get(timeout=1))
    edge.close()
    assert lost.told.empty()


@between_processes
@pytest.mark.parametrize(("how", "busy"), endings(True, False))
def test_a_sender_that_dies_or_stops_is_found(
    kind: EdgeKind, how: signal.Signals, busy: bool, far_end: FarEnds
) -> None:
    """Also while the receiver is busy with a message and more of them wait."""
    end, lost, release = far_end(kind, "send"), Losses(), threading.Event()
    deliver = (lambda message: release.wait()) if busy else (lambda message: None)
    listener = EdgeListener(EPOCH, [inlet(kind, end.pid, deliver, lost)], "127.0.0.1", credentials(HERE))
    end.say(json.dumps(asdict(listener.address)))
    for _ in range(3):
        end.say("send 5000")
        assert end.hear() == "done"
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(end.pid, how)
    peer, why, at = lost.first()
    assert at - began < FOUND_S and peer == "the sender"
    assert how == signal.SIGKILL or "stopped" in why
    release.set()
    listener.close()


@slow
def test_a_host_that_says_nothing_is_found(far_end: FarEnds) -> None:
    """Its whole session is stopped, the heartbeat's process included, so that its kernel alone keeps the connection."""
    end, lost = far_end("tcp", "count"), Losses()
    edge = dial(outlet("tcp", end.pid, end.address()), lost)
    edge.send(b"x")
    end.hear()
    time.sleep(1.5)  # until its helper beats: before that it is given 5 s
    began = time.monotonic()
    os.killpg(end.pid, signal.SIGSTOP)
    _, why, at = lost.first()
    assert at - began < FOUND_S and "nothing comes" in why
    os.killpg(end.pid, signal.SIGKILL)
    edge.close()


@pytest.mark.ray
def test_over_rays_calls_a_dead_receiver_is_found_when_something_is_sent() -> None:
    """The reference keeps no watch of its own; the Supervisor's pings do."""
    from tests.contracts.ray_pair import ray_pair

    with ray_pair() as (edge, received, pid):
        edge.send(b"x")
        assert received.get(timeout=10) == b"x"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PipelineError, match="is gone"):
            for _ in range(100):
                edge.send(b"x")
                time.sleep(0.1)


@slow
@between_processes
@pytest.mark.parametrize("role", ["count", "send"])
def test_a_peer_that_holds_pythons_lock_for_long_is_not_dead(kind: EdgeKind, role: str, far_end: FarEnds) -> None:
    """No thread of it runs for 2.5 s, as in a long call into C. It lives, and goes on afterwards."""
    end, lost = far_end(kind, role), Losses()
    received: queue.Queue[bytes] = queue.Queue()
    if role == "count":
        edge = dial(outlet(kind, end.pid, end.address()), lost)
    else:
        listener = EdgeListener(EPOCH, [inlet(kind, end.pid, received.put, lost)], "127.0.0.1", credentials(HERE))
        end.say(json.dumps(asdict(listener.address)))
    end.say("hold-gil 2.5")
    assert end.hear() == "done"
    assert lost.told.empty()
    if role == "count":
        edge.send(b"alive")
        assert end.hear().split() == ["5", hashlib.sha256(b"alive").hexdigest()]
        edge.close()
    else:
        end.say("send 5")
        assert received.get(timeout=5) == bytes(5)
        listener.close()


@between_processes
def test_a_process_of_another_epoch_is_refused(kind: EdgeKind) -> None:
    """And told both epochs; the edge stays free for the right one."""
    me, lost = os.getpid(), Losses()
    listener = EdgeListener(EPOCH, [inlet(kind, me, lambda m: None, lost)], "127.0.0.1", credentials(HERE))
    with pytest.raises(PipelineError, match=r"epoch 7 .* epoch 6"):
        dial(outlet(kind, me, listener.address), lost, epoch=6)
    dial(outlet(kind, me, listener.address), lost).close()
    listener.close()
    assert lost.told.empty()


@between_processes
def test_an_edge_that_nobody_awaits_or_that_is_there_is_refused(kind: EdgeKind) -> None:
    me, lost = os.getpid(), Losses()
    inlets = [replace(inlet(kind, me, lambda m: None, lost), edge=name) for name in ("e", "f")]
    listener = EdgeListener(EPOCH, inlets, "127.0.0.1", credentials(HERE))
    edge = dial(outlet(kind, me, listener.address), lost)
    for name in ("e", "g", "x" * 100):
        with pytest.raises(PipelineError, match="no edge"):
            dial(replace(outlet(kind, me, listener.address), edge=name), lost)
    edge.close()
    listener.close()


@pytest.mark.parametrize(("caller", "expected"), [(STRANGER, HERE), (THERE, STRANGER)])
def test_a_node_that_shows_another_key_is_refused_by_either_side(caller: Signer, expected: Signer) -> None:
    """A stranger who calls, and a stranger who answers; the right one gets in afterwards."""
    me, lost = os.getpid(), Losses()
    listener = EdgeListener(EPOCH, [inlet("tcp", me, lambda m: None, lost)], "127.0.0.1", credentials(HERE))
    with pytest.raises(PipelineError, match=r"is not the node|no edge"):
        dial(outlet("tcp", me, listener.address, expected), lost, caller)
    dial(outlet("tcp", me, listener.address), lost).close()
    listener.close()


def test_a_node_that_is_awaited_cannot_open_another_nodes_edge() -> None:
    """Two neighbours are let in, each to its own edge only."""
    me, lost = os.getpid(), Losses()
    inlets = [
        inlet("tcp", me, lambda m: None, lost),
        replace(inlet("tcp", me, lambda m: None, lost, STRANGER), edge="f"),
    ]
    listener = EdgeListener(EPOCH, inlets, "127.0.0.1", credentials(HERE))
    with pytest.raises(PipelineError, match="is not the one of"):
        dial(outlet("tcp", me, listener.address), lost, STRANGER)
    listener.close()


def test_an_older_tls_is_refused() -> None:
    """Also of a neighbour, with the right key."""
    listener = EdgeListener(
        EPOCH, [inlet("tcp", os.getpid(), lambda m: None, Losses())], "127.0.0.1", credentials(HERE)
    )
    context = tls_context(credentials(THERE), frozenset((HERE.public,)), listens=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    plain = socket.create_connection((listener.address.host, listener.address.port))
    with plain, pytest.raises(ssl.SSLError, match=r"(?i)version"):
        context.wrap_socket(plain)
    listener.close()


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")
def test_hosts_may_be_known_by_addresses_of_ipv6() -> None:
    received: queue.Queue[bytes] = queue.Queue()
    lost = Losses()
    listener = EdgeListener(EPOCH, [inlet("tcp", os.getpid(), received.put, lost)], "::1", credentials(HERE))
    edge = dial(outlet("tcp", os.getpid(), listener.address), lost)
    edge.send(b"hello")
    assert received.get(timeout=5) == b"hello"
    edge.close()
    listener.close()


def test_a_certificate_that_has_run_out_is_refused() -> None:
    me, lost = os.getpid(), Losses()
    old = HERE.certify_tls(int(time.time()) - 7200, 3600)
    listener = EdgeListener(EPOCH, [inlet("tcp", me, lambda m: None, lost)], "127.0.0.1", old)
    with pytest.raises(PipelineError):
        dial(outlet("tcp", me, listener.address), lost)
    listener.close()


def test_another_process_of_the_same_user_is_refused_by_either_side(far_end: FarEnds) -> None:
    """The kernel says which process calls, and which listens."""
    end, lost = far_end("shared_memory", "count"), Losses()
    address = end.address()
    with pytest.raises(PipelineError, match="is held by process"):
        dial_shared_memory(outlet("shared_memory", end.pid + 1, address), EPOCH, lost)
    listener = EdgeListener(EPOCH, [inlet("shared_memory", end.pid, lambda m: None, lost)], "127.0.0.1", None)
    with pytest.raises(PipelineError, match="refuses the edge: process"):
        dial_shared_memory(outlet("shared_memory", os.getpid(), listener.address), EPOCH, lost)
    assert listener.address.path is not None
    assert Path(listener.address.path).stat().st_mode & 0o777 == 0o600
    listener.close()


def test_a_process_that_is_killed_while_it_listens_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a folder; and the folder for temporary files may have a path longer than an address of a socket."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    end, lost = FarEnd("shared_memory", "count"), Losses()
    edge = dial(outlet("shared_memory", end.pid, end.address()), lost)
    other = FarEnd("shared_memory", "count")
    other.address()  # it listens, and nobody comes
    other.end()
    end.end()
    lost.first()
    edge.close()
    assert not list(folder.iterdir())


class RawTcp:
    """A peer with the right key that then sends what it likes."""

    def __init__(self, address: EdgeAddress) -> None:
        context = tls_context(credentials(THERE), frozenset((HERE.public,)), listens=False)
        self.tls = context.wrap_socket(socket.create_connection((address.host, address.port)))
        self.tls.sendall(Hello(EPOCH, "e").encode())
        answer = self.tls.recv(100)
        assert answer[0] == 1
        self.pulse = socket.create_connection((address.host, address.port))
        self.pulse.sendall(b"llmd-pulse-1\n" + answer[2:18])

    def close(self) -> None:
        self.tls.close()
        self.pulse.close()


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([(0, 1, b"a"), (0, 1, b"a")], "frame 0 where 1 comes next"),  # replayed
        ([(1, 1, b"a")], "frame 1 where 0 comes next"),
        ([(0, MAX_PAYLOAD_BYTES + 1, b"")], "a frame of 1073741825 bytes"),
        ([(0, 0xFFFFFFFE, b"")], "a frame of 4294967294 bytes"),
    ],
)
def test_tcp_frames_that_are_replayed_or_too_large_are_refused(frames: list[tuple[int, int, bytes]], why: str) -> None:
    received: list[bytes] = []
    lost = Losses()
    listener = EdgeListener(EPOCH, [inlet("tcp", os.getpid(), received.append, lost)], "127.0.0.1", credentials(HERE))
    peer = RawTcp(listener.address)
    for number, length, body in frames:
        peer.tls.sendall(struct.pack("<QI", number, length) + body)
    assert why in lost.first()[1]
    assert len(received) <= 1
    peer.close()
    listener.close()


def test_heartbeats_that_are_not_the_peers_end_the_edge() -> None:
    """Who knows the token alone (it crosses the network in the clear) can end an edge, not keep it alive."""
    lost = Losses()
    listener = EdgeListener(EPOCH, [inlet("tcp", os.getpid(), lambda m: None, lost)], "127.0.0.1", credentials(HERE))
    peer = RawTcp(listener.address)
    peer.pulse.sendall(bytes(25))
    assert "heartbeat" in lost.first()[1]
    peer.close()
    listener.close()


@between_processes
@pytest.mark.parametrize("size", [2_000, 50_000])
def test_an_inlet_for_small_messages_takes_no_large_ones(kind: EdgeKind, size: int) -> None:
    """A Head's neighbours answer in a megabyte at most: what one announces beyond that is not waited for."""
    received: queue.Queue[bytes] = queue.Queue()
    lost = Losses()
    small = replace(inlet(kind, os.getpid(), received.put, lost), max_bytes=1_000)
    listener = EdgeListener(EPOCH, [small], "127.0.0.1", credentials(HERE))
    edge = dial(outlet(kind, os.getpid(), listener.address), Losses())
    edge.send(bytes(1_000))
    assert len(received.get(timeout=5)) == 1_000
    with contextlib.suppress(PipelineError):  # the receiver may have hung up before all of it was sent
        edge.send(bytes(size))
    assert f"{size} bytes where at most 1000 are accepted" in lost.first()[1]
    assert received.empty()
    edge.close()
    listener.close()


RECORD = struct.Struct("<BQIQI")


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([RECORD.pack(1, 0, 1, 0, 0) + b"a"] * 2, "message 0 where 1 comes next"),  # replayed
        ([RECORD.pack(1, 0, MAX_PAYLOAD_BYTES + 1, 0, 0)], "a message of 1073741825 bytes"),
        ([RECORD.pack(1, 0, 5, 0, 0) + b"a"], "does not continue"),
        ([RECORD.pack(2, 0, 9, 0, 10)], "does not continue"),  # a piece larger than its message
        ([RECORD.pack(2, 0, 1 << 20, 1 << 19, 10)], "does not continue"),  # from a place that was not written
        ([RECORD.pack(2, 0, 1 << 20, 0, 1 << 20)], "does not continue"),  # past the end of the ring
        ([RECORD.pack(2, 0, 1 << 20, 0, 0)], "does not continue"),
        ([RECORD.pack(9, 0, 0, 0, 0)], "does not continue"),
        ([b"short"], "cut short"),
    ],
)
def test_shared_memory_records_that_do_not_fit_are_refused(
    records: list[bytes], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Losses()
    listener = EdgeListener(EPOCH, [inlet("shared_memory", os.getpid(), lambda m: None, lost)], "127.0.0.1", None)
    assert listener.address.path is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(listener.address.path)
        offer(peer, 1 << 16, sealed=True)
        assert peer.recv(100) == b"\1\0"
        for record in records:
            peer.send(record)
        assert why in lost.first()[1]
    listener.close()


def offer(peer: socket.socket, ring_bytes: int, *, sealed: bool) -> None:
    memory = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, (1 << 16) + 4096)
    if sealed:
        shared_memory.fcntl.fcntl(memory, shared_memory.fcntl.F_ADD_SEALS, shared_memory._SEALS)
    socket.send_fds(peer, [Hello(EPOCH, "e", ring_bytes).encode()], [memory])
    os.close(memory)


@pytest.mark.parametrize(
    ("ring_bytes", "sealed", "why"),
    [(1 << 16, False, b"shorter"), (1 << 17, True, b"a ring said"), (0, True, b"a ring said")],
)
def test_a_ring_that_could_fault_its_reader_is_refused(ring_bytes: int, sealed: bool, why: bytes) -> None:
    """One that is shorter than said, or could be made so, would end the reading process with a SIGBUS."""
    lost = Losses()
    listener = EdgeListener(EPOCH, [inlet("shared_memory", os.getpid(), lambda m: None, lost)], "127.0.0.1", None)
    assert listener.address.path is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(listener.address.path)
        offer(peer, ring_bytes, sealed=sealed)
        assert why in peer.recv(300)
    listener.close()


def test_a_ring_made_shorter_between_the_checks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender shortens it and seals it then, while the receiver looks: the size that counts is the sealed one."""
    lost, asked = Losses(), shared_memory.fcntl.fcntl
    listener = EdgeListener(EPOCH, [inlet("shared_memory", os.getpid(), lambda m: None, lost)], "127.0.0.1", None)
    memory = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, (1 << 16) + 4096)

    def shorten_first(fd: int, what: int, *value: int) -> int:
        if what == shared_memory.fcntl.F_GET_SEALS:
            os.ftruncate(memory, 0)
            asked(memory, shared_memory.fcntl.F_ADD_SEALS, shared_memory._SEALS)
        return asked(fd, what, *value)

    monkeypatch.setattr(shared_memory.fcntl, "fcntl", shorten_first)
    assert listener.address.path is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(listener.address.path)
        socket.send_fds(peer, [Hello(EPOCH, "e", 1 << 16).encode()], [memory])
        assert b"in 0 bytes of memory" in peer.recv(300)
    os.close(memory)
    listener.close()


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(HELLO_BYTES), b"\x16" + bytes(200), b"l" * 99])
def test_strangers_and_silence_do_not_keep_the_neighbour_out(first: bytes) -> None:
    me, lost = os.getpid(), Losses()
    received: queue.Queue[bytes] = queue.Queue()
    listener = EdgeListener(EPOCH, [inlet("tcp", me, received.put, lost)], "127.0.0.1", credentials(HERE))
    strangers = [socket.create_connection((listener.address.host, listener.address.port)) for _ in range(5)]
    for stranger in strangers:
        stranger.sendall(first)
    edge = dial(outlet("tcp", me, listener.address), lost)
    edge.send(b"hello")
    assert received.get(timeout=5) == b"hello"
    edge.close()
    for stranger in strangers:
        stranger.close()
    listener.close()
    assert lost.told.empty()


def test_a_flood_of_strangers_neither_keeps_the_neighbour_out_nor_the_door_open() -> None:
    """More of them than have room, held open and made anew as soon as they are cut."""
    me, lost, ended = os.getpid(), Losses(), threading.Event()
    received: queue.Queue[bytes] = queue.Queue()
    listener = EdgeListener(EPOCH, [inlet("tcp", me, received.put, lost)], "127.0.0.1", credentials(HERE))
    where = (listener.address.host, listener.address.port)
    held: list[socket.socket] = []

    def flood() -> None:
        while not ended.wait(0.02):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(where))

    for _ in range(100):
        held.append(socket.create_connection(where))
    flooding = threading.Thread(target=flood)
    flooding.start()
    edge = dial(outlet("tcp", me, listener.address), lost)
    edge.send(b"hello")
    assert received.get(timeout=5) == b"hello"
    deadline = time.monotonic() + 3
    shut = False
    while not shut and time.monotonic() < deadline:
        time.sleep(0.05)
        try:
            socket.create_connection(where).close()
        except OSError:
            shut = True
    ended.set()
    flooding.join()
    edge.close()
    listener.close()
    for stranger in held:
        stranger.close()
    assert shut and lost.told.empty()


@between_processes
def test_nothing_is_left_behind(kind: EdgeKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor, thread, process or file after closing; nothing in /dev/shm after a killed peer either."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # other programs of this machine use the usual one
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def there() -> tuple[int, int, set[str], set[str]]:
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            {name for name in os.listdir("/dev/shm") if "llmd" in name},
            set(os.listdir(tmp_path)),
        )

    with pair(kind) as p:
        p.edge.send(b"x")  # imports, caches and the like
        p.received.get()
    before = there()
    for _ in range(3):
        with pair(kind) as p:
            p.edge.send(b"x" * 100_000)
            p.received.get()
    end, lost = FarEnd(kind, "count"), Losses()
    edge = dial(outlet(kind, end.pid, end.address()), lost)
    edge.send(bytes(1 << 20))
    os.kill(end.pid, signal.SIGKILL)
    lost.first()
    edge.close()
    end.end()
    deadline = time.monotonic() + 3
    while not no_more(there(), before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert no_more(there(), before), (there(), before)


def no_more(now: tuple[int, int, set[str], set[str]], before: tuple[int, int, set[str], set[str]]) -> bool:
    """Less may be there: threads of earlier tests end meanwhile."""
    return all(a <= b for a, b in zip(now, before, strict=True))
