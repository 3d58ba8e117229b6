"""One download of a block at a time on one machine, whichever of its processes and threads want it.

A byte of a lock file stands for each block, at the offset its hash gives, and is locked while the block is on its way.
The kernel forgets the lock of a process that is killed, so nothing is left behind and nothing has to be cleaned up.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shard_tools.cid import Cid

_POLL_S = 0.002, 0.05  # first and longest pause between two tries: a block takes milliseconds to seconds
_FLOCK = "hhqqi4x"  # struct flock of Linux, 64-bit: type, whence, start, length, process (must be 0)


class Flights:
    """The lock file at `path`, made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def alone(self, cid: Cid, wait_s: float) -> Iterator[None]:
        """Inside, nobody else on this machine is inside for this block; but no longer waited for than wait_s.

        Whoever holds it longer is stuck, and a second download is better than none. Where files cannot be locked (some
        network file systems) everybody is let in.
        """
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # a full disk, or a store that may only be read: put will say so
            yield
            return
        try:
            self._lock(fd, int.from_bytes(cid.digest[:7]), wait_s)
            yield
        finally:
            os.close(fd)  # which unlocks

    def _lock(self, fd: int, place: int, wait_s: float) -> None:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        deadline, pause = time.monotonic() + wait_s, _POLL_S[0]
        while True:
            try:
                # Of the open file, not of the process: threads exclude each other too.
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    return
            except OSError:
                return
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
