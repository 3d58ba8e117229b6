"""A process that says for another one on its host whether that one lives, and hears the same of its peer.

Run as a script beside each end of a TCP edge, with the standard library only:

    python -I -S pulse.py FD PID DIALLED        standard input: 32 bytes of key, later `GOODBYE`; output: the peer's end

Every BEAT_S it reads the state of process PID from /proc and sends it through the connection FD, numbered and
authenticated. It ends when the peer is gone, with a line that says why, or when its own process closes its standard
input. That it is no thread of PID is the point: Python's lock, held there by a long call, does not silence it.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import struct
import sys
import time

BEAT_S = 0.1
SILENT_BEATS = 7  # in a row without a sign of life: dead in 0.8 s, with room for a scheduler that is late
FIRST_BEATS = 50  # the same before the first one: the peer's helper starts up
PULSE_KEY_BYTES = 32

CLOSED = "it closed its end"
ENDED = "its process ended"
STOPPED = "its process is stopped"
SILENT = "nothing comes from its host"
GOODBYE = b"."

RUNS, HALTED, GONE, PARTS = 0, 1, 2, 3  # what a beat says of its process; PARTS: it closes this edge

_BEAT = struct.Struct("<QB")  # number from 0, what it says; then a code over both
_CODE_BYTES = 16
BEAT_BYTES = _BEAT.size + _CODE_BYTES


def state_of(folder: int) -> int:
    """RUNS, HALTED or GONE: what the kernel says of the process whose folder in /proc this is."""
    try:
        fd = os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            line = os.read(fd, 1024)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return GONE
    state = line.rpartition(b")")[2].split()[0]  # after the name, which may hold anything
    return HALTED if state in b"Tt" else GONE if state in b"ZXx" else RUNS


def beat(key: bytes, dialled: bool, number: int, says: int) -> bytes:
    """One heartbeat. dialled: by the side that opened the edge, so none can be sent back where it came from."""
    body = _BEAT.pack(number, says)
    return body + hmac.digest(key, b"%d" % dialled + body, "sha256")[:_CODE_BYTES]


class Heart:
    """What one end knows of the other from its heartbeats. Knows no sockets and no clock."""

    def __init__(self, key: bytes, dialled: bool) -> None:
        self._key, self._from_dialler = key, not dialled
        self._next = 0
        self._silent = SILENT_BEATS - FIRST_BEATS
        self._lived = False
        self._last = RUNS

    def take(self, data: bytes) -> str | None:
        """A heartbeat came. Returns why the peer is gone, if that is what it says or if it is no heartbeat of its."""
        says = data[_BEAT.size - 1]
        if not hmac.compare_digest(data, beat(self._key, self._from_dialler, self._next, says)):
            return "a heartbeat came that is not its next one"
        if self._next == 0:
            self._silent = 0  # its helper is there: from now on silence means something
        self._next += 1
        self._last = says
        self._lived = self._lived or says == RUNS
        return {GONE: ENDED, PARTS: CLOSED}.get(says)

    def tick(self) -> str | None:
        """BEAT_S have passed, in which this process could run. Returns why the peer counts as gone, or None."""
        self._silent = 0 if self._lived else self._silent + 1
        self._lived = False
        if self._silent < SILENT_BEATS:
            return None
        return STOPPED if self._last == HALTED else SILENT


def keep(connection: socket.socket, owner: int, key: bytes, dialled: bool) -> str | None:
    """Beat and listen until the peer is gone (returns why) or the owner closes standard input (returns None)."""
    connection.setblocking(False)
    heart, sent, received = Heart(key, dialled), 0, b""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(connection, select.POLLIN)
    due = time.monotonic()
    while True:
        wait_s = due - time.monotonic()
        ready = {fd for fd, _ in poller.poll(max(0.0, wait_s) * 1000)}
        try:
            if 0 in ready:
                if os.read(0, 1) == GOODBYE:
                    connection.send(beat(key, dialled, sent, PARTS))
                return None
            if connection.fileno() in ready:
                data = connection.recv(4096)
                if not data:
                    return "its host ended the connection"
                received += data
            while len(received) >= BEAT_BYTES:
                why = heart.take(received[:BEAT_BYTES])
                received = received[BEAT_BYTES:]
                if why is not None:
                    return why
            if time.monotonic() < due:
                continue
            # Counted in beats, and from now: had this host been asleep, the peer would not be to blame for it.
            due = time.monotonic() + BEAT_S
            why = heart.tick()
            if why is not None:
                return why
            if connection.send(beat(key, dialled, sent, state_of(owner))) < BEAT_BYTES:
                return "it takes no heartbeats"
            sent += 1
        except OSError as e:
            return f"the connection to its host ended ({e.strerror})"


def _main() -> None:
    fd, pid, dialled = (int(argument) for argument in sys.argv[1:4])
    key = b""
    while len(key) < PULSE_KEY_BYTES:
        data = os.read(0, PULSE_KEY_BYTES - len(key))
        if not data:
            return
        key += data
    owner = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
    why = keep(socket.socket(fileno=fd), owner, key, bool(dialled))
    if why is not None:
        os.write(1, why.encode())


if __name__ == "__main__":
    _main()
