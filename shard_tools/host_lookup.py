"""A host's addresses within a time, though the C library's lookup knows none: it may wait for minutes on a dead server.

The lookup runs in a daemon thread, which nobody waits for past the time given; one that hangs is shared by all who ask
for that name, so however often is asked, one name costs one thread.
"""

from __future__ import annotations

import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

Address = tuple[int, tuple[Any, ...]]  # family, and what a socket of it connects to

_guard = threading.Lock()
_running: dict[tuple[str, int], Future[list[Address]]] = {}


def addresses(host: str, port: int, within_s: float) -> list[Address]:
    """The host's addresses, best first. Raises OSError where the name has none, TimeoutError past within_s."""
    with suppress(socket.gaierror):
        return _look_up(host, port, socket.AI_NUMERICHOST)  # a number, which asks nobody
    with _guard:
        found = _running.get((host, port))
        if found is None:
            found = _running[host, port] = Future()
            threading.Thread(target=_fill, args=(host, port, found), name="host lookup", daemon=True).start()
    return found.result(max(within_s, 0.0))


def _fill(host: str, port: int, future: Future[list[Address]]) -> None:
    try:
        future.set_result(_look_up(host, port))
    except Exception as e:  # a name that no encoding takes raises a UnicodeError
        future.set_exception(e)
    finally:
        with _guard:
            del _running[host, port]


def _look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    said = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in said]
