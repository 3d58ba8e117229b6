"""HTTP requests that end in time and in bounds, whatever the server does.

The deadline is kept below the HTTP library, on each read of the socket, so neither headers nor bytes that drip one by
one outlast it, nor does the lookup of a name; no more is read than the caller allows. Redirects are not followed,
compression is not asked for, and proxies of the environment are not used. Knows nothing of blocks or names.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shard_tools.cluster_key import proof
from shard_tools.errors import InputError, UnreachableError
from shard_tools.host_lookup import addresses

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

ANSWER_S = 30.0  # 2 MiB at 70 kB/s
DEPTH_HEADER = "x-llmd-depth"  # how many nodes a request has passed: a peer asked by a peer asks no further peer

_BUFFER_BYTES = 64 << 10  # of headers; a body is read past it
_MAX_LOCATION = 8 << 10  # signed addresses of object stores have some 2,000 characters
_IDLE = 32  # connections kept for the next request; as many as a store has threads


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may take, seconds. answer: for a whole block, from the first byte sent to the last received."""

    connect_s: float = 5.0
    answer_s: float = ANSWER_S


@dataclass(frozen=True, slots=True)
class Answer:
    """status, and the body of a 200 or 206; said: of any other, the first words of its body, for a person.

    location: where a redirect points, as the server wrote it.
    """

    status: int
    body: bytes
    said: str
    location: str = ""

    def problem(self) -> str:
        """What an error says of an answer that is no use."""
        return f"answers with HTTP {self.status}" + (f": {self.said}" if self.said else "")


class HttpClient:
    """Asks one server; threads share its kept connections."""

    def __init__(self, url: str, label: str, patience: Patience, secret: bytes | None = None, depth: int = 0) -> None:
        """url: `http[s]://host[:port][/prefix]`. label: what errors call the server.

        secret: the cluster's key, if the server is a node of ours. depth: how many nodes a request has passed before.
        Raises InputError.
        """
        self._scheme, self._host, self._port, self._prefix = parse_url(url)
        self._label, self._patience, self._secret, self._depth = label, patience, secret, depth
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._tls = ssl.create_default_context() if self._scheme == "https" else None

    def close(self) -> None:
        """No connection is kept any more."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def ask(self, method: str, target: str, accept: str, max_bytes: int, span: tuple[int, int] | None = None) -> Answer:
        """The answer to one request. Raises UnreachableError, also for a body of more than max_bytes.

        span: only bytes [start, stop) are asked for. A 206 brings them; the body of a 200 is then left unread.
        """
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        with self._asked(method, target, accept, headers) as (_, response):
            location = (response.getheader("Location") or "")[:_MAX_LOCATION]
            if response.status not in (200, 206):
                said = printable(response.read(300).decode("ascii", "replace"))
                return Answer(response.status, b"", said, location)
            if span is not None and response.status == 200:
                return Answer(200, b"", "")
            return Answer(response.status, _whole(response, max_bytes, method == "HEAD"), "")

    @contextmanager
    def stream(self, target: str, accept: str, pause_s: float) -> Iterator[Stream]:
        """An answer that is read as it comes: no longer than pause_s from one `Stream.renew` to the next.

        Raises UnreachableError, also out of what is done inside.
        """
        with self._asked("GET", target, accept, {}) as (connection, response):
            yield Stream(response, connection, pause_s)

    @contextmanager
    def _asked(
        self, method: str, target: str, accept: str, more: dict[str, str]
    ) -> Iterator[tuple[_Connection, http.client.HTTPResponse]]:
        """One request is sent and its answer has begun; the connection is kept for another if all of it was read."""
        headers = {"Accept": accept, "Accept-Encoding": "identity", "User-Agent": "llmd", **more}
        if self._secret is not None:
            headers["Authorization"] = proof(self._secret, method, target, self._depth, int(time.time()))
            headers[DEPTH_HEADER] = str(self._depth)
        deadline = time.monotonic() + self._patience.answer_s
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        connection = kept or self._fresh()
        try:
            try:
                response = self._send(connection, method, target, headers, deadline)
            except (http.client.RemoteDisconnected, ConnectionError):
                if kept is None:
                    raise
                connection.close()  # the server had closed a kept connection in the meantime: no fault of anybody
                connection = self._fresh()
                response = self._send(connection, method, target, headers, deadline)
            yield connection, response
        except TimeoutError as e:
            connection.close()
            raise UnreachableError(self._label, f"did not answer within {connection.given_s:g} s") from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            connection.close()
            raise UnreachableError(self._label, f"cannot be asked: {_reason(e)}") from e
        except BaseException:
            connection.close()
            raise
        self._keep(connection, response)

    def _send(
        self, connection: _Connection, method: str, target: str, headers: dict[str, str], deadline: float
    ) -> http.client.HTTPResponse:
        connection.deadline, connection.given_s = deadline, self._patience.answer_s
        connection.request(method, self._prefix + target, headers=headers)
        return connection.getresponse()

    def _keep(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        whole = response.isclosed() and not response.will_close
        with self._lock:
            if whole and len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _fresh(self) -> _Connection:
        return _Connection(self._host, self._port, self._tls, self._patience.connect_s)


class Stream:
    """The body of an answer that has begun. kind: its Content-Type, in lower case."""

    def __init__(self, response: http.client.HTTPResponse, connection: _Connection, pause_s: float) -> None:
        self._response, self._connection, self._pause_s = response, connection, pause_s
        self.status, self.kind = response.status, (response.getheader("Content-Type") or "").lower()

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end. Raises what `HttpClient.stream` makes an UnreachableError of."""
        return self._response.read(size)

    def renew(self) -> None:
        """What follows has its own time."""
        self._connection.deadline, self._connection.given_s = time.monotonic() + self._pause_s, self._pause_s


class _Connection(http.client.HTTPConnection):
    """One connection of which every read and write ends at `deadline`, of time.monotonic, given_s after it was set."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, connect_s: float) -> None:
        super().__init__(host, port, timeout=connect_s)
        self._tls = tls
        self.deadline = self.given_s = 0.0

    def connect(self) -> None:
        plain = self._connected()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock = self._tls.wrap_socket(plain, server_hostname=self.host) if self._tls else plain
        except BaseException:
            plain.close()
            raise
        self.sock: _Timed = _Timed(sock, self)

    def _connected(self) -> socket.socket:
        """A socket to the first address of the host that takes one, all within the time for connecting."""
        until = time.monotonic() + min(self.timeout or 0.0, self.left_s())
        error: OSError = OSError("the name has no address")
        for family, address in addresses(self.host, self.port, until - time.monotonic()):
            plain = socket.socket(family, socket.SOCK_STREAM)
            try:
                plain.settimeout(max(until - time.monotonic(), 0.001))
                plain.connect(address)
                return plain
            except OSError as e:
                plain.close()
                error = e
        raise error

    def left_s(self) -> float:
        """Seconds until the deadline. Raises TimeoutError past it."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Timed:
    """What http.client needs of a socket, each call bounded by the connection's deadline."""

    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        self._sock, self._connection = sock, connection
        self._reads: _TimedReads | None = None

    def sendall(self, data: ReadableBuffer) -> None:
        self._sock.settimeout(self._connection.left_s())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        self._reads = _TimedReads(self._sock, self._connection)
        return io.BufferedReader(self._reads, _BUFFER_BYTES)

    def close(self) -> None:
        """Closed, or once its answer is read: http.client closes first, and then reads an answer without a length."""
        if self._reads is None or self._reads.closed:
            self._sock.close()
        else:
            self._reads.last = True


class _TimedReads(io.RawIOBase):
    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        self._sock, self._connection, self.last = sock, connection, False

    def readable(self) -> bool:
        return True

    def readinto(self, into: WriteableBuffer) -> int:
        self._sock.settimeout(self._connection.left_s())
        return self._sock.recv_into(into)

    def close(self) -> None:
        if not self.closed and self.last:
            self._sock.close()
        super().close()


def printable(text: str, most: int = 300) -> str:
    """What a stranger said, fit for a terminal and a log: no control characters, and not long."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())


def parse_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path prefix of an address. Raises InputError."""
    hint = "expected http://host:port or https://host"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise InputError(f"{url[:200]!r} is no address: {e}; {hint}") from e
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise InputError(f"{url[:200]!r} is no address of a gateway or peer: {hint}")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


def _whole(response: http.client.HTTPResponse, max_bytes: int, head: bool) -> bytes:
    if response.length is not None and response.length > max_bytes:
        raise ValueError(f"it answers with {response.length} bytes where at most {max_bytes} can be right")
    if head:
        return b""
    body = response.read(max_bytes + 1)
    if response.length:
        raise ValueError(f"it hung up {response.length} bytes before the end")
    if len(body) > max_bytes:
        raise ValueError(f"it answers with more than {max_bytes} bytes")
    return body


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)[:200] or type(error).__name__
