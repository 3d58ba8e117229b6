"""Whether the process at the other end of an edge lives. A dead or stopped one is known within a second.

Dead is a process that has ended or is stopped (SIGSTOP), or a host that says nothing. A *slow* one is not dead: it
may compute for a minute, and hold Python's lock in a long call of C meanwhile, in which no thread of it could answer a
heartbeat. So none is asked of it. On one host the kernel knows: /proc says whether the peer runs, sleeps, is stopped or
gone. Between hosts a small process beside each end (pulse.py) reads that of its own and tells the other one. A process
that hangs without being stopped is the affair of the Head's step timeout and of the Supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from serve_app.errors import PipelineError
from serve_app.transport import pulse
from serve_app.transport.edge import Lost
from serve_app.transport.pulse import BEAT_S, CLOSED, ENDED, SILENT_BEATS, STOPPED

_log = logging.getLogger(__name__)


class Signs(Protocol):
    """Where the signs of one peer's life come from."""

    every_s: float | None  # how often to ask; None: when `fileno` can be read

    def fileno(self) -> int | None:
        """What becomes readable when there is news."""

    def check(self) -> str | None:
        """Why the peer counts as gone (CLOSED if it said so itself), or None."""

    def close(self) -> None:
        """Stop asking, and tell the peer, if it listens, that this end was closed in good order."""


class ProcessSigns:
    """Of a process on this host, from the kernel."""

    every_s: float | None = BEAT_S

    def __init__(self, pid: int, closed: Callable[[], bool]) -> None:
        """closed: whether the peer has said that it closes. Raises OSError if there is no such process."""
        # The open folder stays that of this process, whoever gets its number afterwards.
        self._folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._closed = closed
        self._stopped = 0  # times in a row

    def fileno(self) -> int | None:
        return None

    def check(self) -> str | None:
        state = pulse.state_of(self._folder)
        if state == pulse.GONE:
            return CLOSED if self._closed() else ENDED
        self._stopped = self._stopped + 1 if state == pulse.HALTED else 0
        return STOPPED if self._stopped >= SILENT_BEATS else None

    def close(self) -> None:
        os.close(self._folder)


class HeartbeatSigns:
    """Of a process on another host, from the heartbeats between a helper process here and one there."""

    every_s: float | None = None

    def __init__(self, connection: socket.socket, key: bytes, *, dialled: bool) -> None:
        """Takes the connection over. key: PULSE_KEY_BYTES that only the two ends know."""
        with connection:
            fd = connection.fileno()
            self._helper = subprocess.Popen(
                # -I -S: no site packages, no environment: it starts in 15 ms and needs the standard library only.
                [sys.executable, "-I", "-S", pulse.__file__, str(fd), str(os.getpid()), str(int(dialled))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[fd],
            )
        assert self._helper.stdin is not None and self._helper.stdout is not None
        self._helper.stdin.write(key)
        self._helper.stdin.flush()
        self._out = self._helper.stdout.fileno()

    def fileno(self) -> int | None:
        return self._out

    def check(self) -> str | None:
        return os.read(self._out, 500).decode("utf-8", "replace") or "the heartbeat helper on this host was killed"

    def close(self) -> None:
        assert self._helper.stdin is not None and self._helper.stdout is not None
        with contextlib.suppress(OSError):
            self._helper.stdin.write(pulse.GOODBYE)
            self._helper.stdin.close()
        try:
            self._helper.wait(1.0)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()
        self._helper.stdout.close()


class Watch:
    """A thread that waits for the end of a peer."""

    def __init__(self, signs: Signs, gone: Callable[[str], None], hangup: socket.socket | None = None) -> None:
        """gone: called once at most. hangup: a connection whose end is the peer's end, because nothing waits in it."""
        self._signs, self._gone, self._hangup = signs, gone, hangup
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = threading.Lock()  # taken once and kept
        self._thread = threading.Thread(target=self._run, name="edge-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching. Blocks for two seconds at most."""
        if not self._closing.acquire(blocking=False):
            return
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            os.close(self._wake)
            self._signs.close()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._hangup is not None:
            poller.register(self._hangup, select.POLLRDHUP)
        source = self._signs.fileno()
        if source is not None:
            poller.register(source, select.POLLIN)
        every_ms = None if self._signs.every_s is None else self._signs.every_s * 1000
        while True:
            ready = {fd for fd, _ in poller.poll(every_ms)}
            if self._wake in ready:
                return
            if source in ready or source is None:
                why = self._signs.check()
                if why == CLOSED and self._hangup is None:
                    return  # the receiver comes upon the last message in its own time
                if why is not None:
                    self._gone(why)
                    return
            if self._hangup is not None and self._hangup.fileno() in ready:
                self._gone("the connection ended")
                return


class End:
    """The state of one end of an edge: open, closed by us, or lost; the owner hears of a loss once."""

    def __init__(self, peer: str, lost: Lost, cut: Callable[[], None]) -> None:
        """cut: ends the connection, so that whoever blocks in it wakes; may be called more than once."""
        self.peer, self._lost, self._cut = peer, lost, cut
        self._lock = threading.Lock()
        self._why: str | None = None

    @property
    def why(self) -> str | None:
        """Why nothing goes through any more, or None."""
        return self._why

    def error(self) -> PipelineError:
        """What a send raises when nothing goes through any more."""
        if self._why == _SHUT:
            return PipelineError(f"the edge to {self.peer} was closed")
        return PipelineError(f"{self.peer} is gone: {self._why}")

    def fail(self, why: str, *, sending: bool = False) -> None:
        """The peer is gone. The first reason counts.

        sending: a send found it. Whoever sends may hold locks that the owner takes when it hears of the loss (it stood
        still for ever so), and hears it from a thread of its own.
        """
        with self._lock:
            first, self._why = self._why is None, self._why or why
        if not first:
            return
        _log.info("the edge to or from %s is lost: %s", self.peer, why)
        self._cut()
        if sending:
            threading.Thread(target=self._lost, args=(self.peer, why), name="edge-lost", daemon=True).start()
        else:
            self._lost(self.peer, why)

    def shut(self) -> bool:
        """Closed by us: no loss any more. Returns False if that has happened before."""
        with self._lock:
            first, self._why = self._why != _SHUT, _SHUT
        return first


_SHUT = "this end was closed"
