"""A node's blocks and names over HTTP, to the other nodes of its cluster: `/ipfs/<cid>?format=raw`, `/names/<name>`.

The hot path inside a cluster, so it is plain: a thread per connection, and the kernel copies a file to the socket.
It speaks as trustless gateways do, hence one client for both. Nothing is hashed here; whoever asked does that.

A block that is not here may be pulled: the node fetches it from outside, keeps it, and answers. All nodes ask the same
node first (peers.py), so a block comes into a cluster once. A request that has passed a node already is answered
out of what is here or outside, never by asking a third node, so none goes in circles.

Who has the cluster's key may also tell a node to get a block (`PUT /ipfs/<cid>`) and to keep a model that it has whole
(`PUT /pins/<cid>`): that is how copies that became too few are made again (replication.py).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

from shard_tools.cid import Cid
from shard_tools.cluster_key import check_proof
from shard_tools.errors import CorruptBlockError, FormatError, InputError, LlmdError, NotFoundError
from shard_tools.http_client import DEPTH_HEADER
from shard_tools.index.model_index import ModelIndex
from shard_tools.store.block_store import BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.http_source import RAW

MAX_CONNECTIONS = 512  # of 64 nodes with 8 threads each
MAX_HEAD_BYTES = 8 << 10
IDLE_S = 75.0  # a kept connection without a request is closed
SEND_S = 60.0  # for the largest block: a client that does not read is left

_METHODS = ("GET", "HEAD", "PUT")
_LOOPBACK = ("127.", "::1", "localhost")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
}
_REASONS |= {403: "Forbidden", 408: "Request Timeout", 431: "Request Header Fields Too Large", 502: "Bad Gateway"}
_REASONS |= {503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    headers: dict[str, str]  # names in lower case


class PinBoard(Protocol):
    """Which models a node keeps whole."""

    def lacks(self, manifest: Cid) -> str:
        """Why the node does not keep all of the model; empty if it does."""

    def pin(self, manifest: Cid) -> None:
        """The model, all of which is here, is kept. Raises NotFoundError, InputError."""


class BlockServer:
    """Serves one store until closed; `port` is the one it got."""

    def __init__(
        self,
        store: DirectoryStore,
        host: str,
        port: int,
        secret: bytes | None,
        pull: BlockSource | None = None,
        names: ModelIndex | None = None,
        pins: PinBoard | None = None,
    ) -> None:
        """secret: of the cluster; None lets everybody read, so only on loopback. pull: where else a block may be.

        names: whose records are served beside the blocks. pins: what the cluster may have kept here.

        Raises InputError if the address cannot be had, or would be open to strangers.
        """
        if secret is None and not host.startswith(_LOOPBACK):
            raise InputError(f"{host} is open to others, and there is no cluster key: make one with `llmd blocks key`")
        self._store, self._secret, self._pull, self._names, self._pins = store, secret, pull, names, pins
        self._closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as e:
            raise InputError(f"cannot serve blocks at {host}:{port}: {e.strerror}. Choose another address.") from e
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="block server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is served any more, and every connection is closed."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                time.sleep(0.05)  # out of file descriptors, say: those in use are given back
                continue
            with self._lock:
                full = len(self._open) >= MAX_CONNECTIONS
                if not full:
                    self._open.add(connection)
            if full:
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="block connection", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rest = b""
            while not self._closed.is_set():
                head, rest = _head(connection, rest)
                if head is None or not self._answer(connection, head):
                    return
        except (OSError, FormatError):
            pass  # the client has gone, or speaks no HTTP: nobody is left to be told
        finally:
            with self._lock:
                self._open.discard(connection)
            with suppress(OSError):
                connection.close()

    def _answer(self, connection: socket.socket, head: bytes) -> bool:
        """Whether the connection may be used again."""
        connection.settimeout(SEND_S)
        try:
            request = _parse(head)
            depth = int(request.headers.get(DEPTH_HEADER, "0")[:3])
            if request.method not in _METHODS or request.headers.get("content-length", "0") != "0":
                return _say(connection, 405, "only GET, HEAD and PUT are answered, without a body", False)
            if self._secret is not None:
                given, now_s = request.headers.get("authorization", ""), int(time.time())
                problem = check_proof(self._secret, request.method, request.target, depth, given, now_s)
                if problem is not None:
                    return _say(connection, 401, problem, False)
            if request.method == "PUT" and self._secret is None:
                return _say(connection, 403, "only who has the cluster's key tells a node what to keep", True)
            if request.target.startswith("/pins/"):
                return self._send_pin(connection, request, Cid.parse(request.target.removeprefix("/pins/")))
            if request.target.startswith("/names"):
                if request.method == "PUT":
                    return _say(connection, 405, "names are published where they are kept", False)
                return self._send_names(connection, request)
            cid = _cid(request.target)
        except (FormatError, ValueError) as e:
            return _say(connection, 400, str(e), False)
        if request.method == "PUT":
            return self._get_block(connection, cid)
        return self._send_block(connection, request.method, cid, depth)

    def _send_pin(self, connection: socket.socket, request: _Request, manifest: Cid) -> bool:
        try:
            if self._pins is None or request.method == "HEAD":
                raise NotFoundError("a list of pins", "this node")
            if request.method == "PUT":
                self._pins.pin(manifest)
                return _say(connection, 200, "", True)
            said = self._pins.lacks(manifest)
        except LlmdError as e:
            said = str(e) or "it cannot be kept"
        return _say(connection, 404 if said else 200, said[:1000], True, request.method)

    def _get_block(self, connection: socket.socket, cid: Cid) -> bool:
        """The block is here, whole, or the answer says why not."""
        try:
            if self._pull is not None:
                self._pull.get(cid)  # which hashes what is here, and replaces what is torn
            else:
                self._store.get(cid)
        except (NotFoundError, CorruptBlockError) as e:
            return _say(connection, 404, str(e)[:1000], True)
        except LlmdError as e:
            return _say(connection, 502, str(e)[:1000], True)
        return _say(connection, 200, "", True)

    def _send_names(self, connection: socket.socket, request: _Request) -> bool:
        """A name's record, or all names, one a line: as a web server gives the folder `names`, but for the list."""
        name = unquote(
            unquote(request.target.removeprefix("/names").removeprefix("/"))
        )  # as of the file, in an address
        try:
            if self._names is None:
                raise NotFoundError("an index", "this node")
            if not name:
                body, kind = "".join(f"{known}\n" for known in self._names.names()).encode(), "text/plain"
            else:
                body, kind = self._names.resolve(name).encode(), "application/vnd.ipld.dag-cbor"
        except LlmdError as e:
            return _say(connection, 404, str(e)[:1000], True, request.method)
        head = _headers(200, len(body), kind, fixed=False)
        connection.sendall(head + (b"" if request.method == "HEAD" else body))
        return True

    def _send_block(self, connection: socket.socket, method: str, cid: Cid, depth: int) -> bool:
        try:
            file = self._store.open_block(cid)
        except NotFoundError:
            return self._send_pulled(connection, method, cid, depth)
        with file:
            size = os.fstat(file.fileno()).st_size
            more = socket.MSG_MORE if method == "GET" and size else 0
            connection.sendall(_headers(200, size, RAW), more)
            if method == "GET" and size:
                return connection.sendfile(file, 0, size) == size
        return True

    def _send_pulled(self, connection: socket.socket, method: str, cid: Cid, depth: int) -> bool:
        if self._pull is None or method == "HEAD" or depth > 0:
            return _say(connection, 404, "it is not here", True, method)
        try:
            block = self._pull.get(cid)
        except (NotFoundError, CorruptBlockError) as e:
            return _say(connection, 404, str(e)[:1000], True)
        except LlmdError as e:
            return _say(connection, 502, str(e)[:1000], True)
        connection.sendall(_headers(200, len(block), RAW), socket.MSG_MORE if block else 0)
        connection.sendall(block)
        return True


def _head(connection: socket.socket, rest: bytes) -> tuple[bytes | None, bytes]:
    """The next request's head and what came behind it; None where the client has ended. Raises FormatError, OSError."""
    deadline = time.monotonic() + IDLE_S
    while b"\r\n\r\n" not in rest:
        if len(rest) > MAX_HEAD_BYTES:
            raise FormatError("a request's head without an end")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        more = connection.recv(MAX_HEAD_BYTES)
        if not more:
            return None, b""
        rest += more
    head, _, rest = rest.partition(b"\r\n\r\n")
    return head, rest


def _parse(head: bytes) -> _Request:
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise FormatError("this is no request of HTTP/1.1")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise FormatError("a header has no name")
        headers[name.lower()] = value.strip()
    return _Request(words[0], words[1], headers)


def _cid(target: str) -> Cid:
    path, _, query = target.partition("?")
    if not path.startswith("/ipfs/") or query not in ("format=raw", ""):
        raise FormatError("only /ipfs/<cid>?format=raw and /names/<name> are served")
    return Cid.parse(path.removeprefix("/ipfs/"))


def _headers(status: int, size: int, kind: str, fixed: bool = True) -> bytes:
    lines = f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {size}"
    cached = (
        "Cache-Control: public, max-age=29030400, immutable" if status == 200 and fixed else "Cache-Control: no-store"
    )
    return "\r\n".join((*lines, cached, "X-Content-Type-Options: nosniff", "", "")).encode()


def _say(connection: socket.socket, status: int, text: str, keep: bool, method: str = "GET") -> bool:
    body = text.encode("ascii", "replace")
    head = _headers(status, len(body), "text/plain")
    if not keep:
        head = head[:-2] + b"Connection: close\r\n\r\n"
    connection.sendall(head + (b"" if method == "HEAD" else body))
    return keep
