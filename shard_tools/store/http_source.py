"""Blocks over HTTP, trusting nobody: `GET /ipfs/<cid>?format=raw`, as every trustless gateway and our own peers answer.

Every block is hashed here. A request ends within its time whatever the server does: the deadline is kept below the
HTTP library, on each read of the socket, so neither headers nor bytes that drip one by one outlast it. No more than
a block's largest size is read. Redirects are not followed and proxies of the environment not used.
Source: https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shard_tools.cid import Cid
from shard_tools.errors import InputError, NotFoundError, UnreachableError
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block
from shard_tools.store.cluster_key import proof

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

RAW = "application/vnd.ipld.raw"
DEPTH_HEADER = "x-llmd-depth"  # how many nodes a request has passed: a peer asked by a peer asks no further peer

_BUFFER_BYTES = 64 << 10  # of headers; a body is read past it
_IDLE = 32  # connections kept for the next request; as many as a store has threads


ANSWER_S = 30.0  # 2 MiB at 70 kB/s


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may take, seconds. answer: for a whole block, from the first byte sent to the last received."""

    connect_s: float = 5.0
    answer_s: float = ANSWER_S


class HttpSource:
    """A BlockSource at one address; its threads share kept connections."""

    def __init__(self, url: str, kind: str, patience: Patience, secret: bytes | None = None, depth: int = 0) -> None:
        """url: `http[s]://host[:port][/prefix]`. kind: what errors call it, `gateway` or `peer`.

        secret: the cluster's key, for peers. depth: how many nodes a request passed before. Raises InputError.
        """
        self._scheme, self._host, self._port, self._prefix = parse_url(url)
        self._kind, self._url, self._patience, self._secret, self._depth = kind, url, patience, secret, depth
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._tls = ssl.create_default_context() if self._scheme == "https" else None

    @property
    def label(self) -> str:
        return f"{self._kind} {self._url}"

    def get(self, cid: Cid) -> bytes:
        status, body, said = self._ask("GET", cid)
        if status == 200:
            return check_block(cid, body, self.label)
        raise self._refusal(status, cid, said)

    def has(self, cid: Cid) -> bool:
        status, _, said = self._ask("HEAD", cid)
        if status in (200, 404, 410):
            return status == 200
        raise self._refusal(status, cid, said)

    def close(self) -> None:
        """No connection is kept any more."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _ask(self, method: str, cid: Cid) -> tuple[int, bytes, str]:
        """Status, body of a 200, and what the server says of itself otherwise."""
        headers = {"Accept": RAW, "Accept-Encoding": "identity", "User-Agent": "llmd"}
        if self._secret is not None:
            headers["Authorization"] = proof(self._secret, method, cid, self._depth, int(time.time()))
            headers[DEPTH_HEADER] = str(self._depth)
        deadline = time.monotonic() + self._patience.answer_s
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        connection = kept or self._fresh()
        try:
            try:
                response = self._send(connection, method, cid, headers, deadline)
            except (http.client.RemoteDisconnected, ConnectionError):
                if kept is None:
                    raise
                connection.close()  # the server had closed a kept connection in the meantime: no fault of anybody
                connection = self._fresh()
                response = self._send(connection, method, cid, headers, deadline)
            body, said = self._read(response, method)
        except TimeoutError as e:
            connection.close()
            raise UnreachableError(self.label, f"did not answer within {self._patience.answer_s:g} s") from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            connection.close()
            raise UnreachableError(self.label, f"cannot be asked: {_reason(e)}") from e
        except BaseException:
            connection.close()
            raise
        self._keep(connection, response)
        return response.status, body, said

    def _send(
        self, connection: _Connection, method: str, cid: Cid, headers: dict[str, str], deadline: float
    ) -> http.client.HTTPResponse:
        connection.deadline = deadline
        connection.request(method, f"{self._prefix}/ipfs/{cid}?format=raw", headers=headers)
        return connection.getresponse()

    def _read(self, response: http.client.HTTPResponse, method: str) -> tuple[bytes, str]:
        if response.status != 200:
            return b"", response.read(300).decode("ascii", "replace").strip()
        if response.length is not None and response.length > MAX_BLOCK_BYTES:
            raise ValueError(f"it answers with {response.length} bytes, and a block has at most {MAX_BLOCK_BYTES}")
        if method == "HEAD":
            return b"", ""
        body = response.read(MAX_BLOCK_BYTES + 1)
        if response.length:
            raise ValueError(f"it hung up {response.length} bytes before the end of a block")
        if len(body) > MAX_BLOCK_BYTES:
            raise ValueError(f"it answers with more than a block's {MAX_BLOCK_BYTES} bytes")
        return body, ""

    def _keep(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        whole = response.isclosed() and not response.will_close
        with self._lock:
            if whole and len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _fresh(self) -> _Connection:
        return _Connection(self._host, self._port, self._tls, self._patience.connect_s)

    def _refusal(self, status: int, cid: Cid, said: str) -> Exception:
        if status in (404, 410):
            return NotFoundError(f"block {cid}", self.label, said)
        hint = f": {said}" if said.isprintable() and said else ""
        return UnreachableError(self.label, f"answers with HTTP {status}{hint}")


class _Connection(http.client.HTTPConnection):
    """One connection of which every read and write ends at `deadline`, of time.monotonic."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, connect_s: float) -> None:
        super().__init__(host, port, timeout=connect_s)
        self._tls = tls
        self.deadline = 0.0

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), min(self.timeout or 0.0, self.left_s()))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock = self._tls.wrap_socket(plain, server_hostname=self.host) if self._tls else plain
        except BaseException:
            plain.close()
            raise
        self.sock: _Timed = _Timed(sock, self)

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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)[:200] or type(error).__name__
