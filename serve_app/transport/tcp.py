"""An edge between two hosts: numbered frames inside TLS 1.3, and beside them a connection of heartbeats.

Backpressure is TCP's own: a receiver that is behind does not read. Each end touches its TLS state in one thread at a
time (OpenSSL allows no more); whoever must interrupt that thread shuts the connection below it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading

from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import MAX_PAYLOAD_BYTES
from serve_app.transport.edge import Lost, Rows
from serve_app.transport.handshake import HANDSHAKE_S, Hello, Inlet, Outlet, accepted, read_answer
from serve_app.transport.liveness import End, HeartbeatSigns, Watch
from serve_app.transport.pulse import ENDED, PULSE_KEY_BYTES
from serve_app.transport.tls import peer_of, tls_context
from shard_tools.signing import key_text

PULSE_MAGIC = b"llmd-pulse-1\n"
TOKEN_BYTES = 16  # names the edge that a connection of heartbeats belongs to
_FRAME = struct.Struct("<QI")  # number from 0, bytes that follow
_END = 0xFFFFFFFF  # in place of a length: the sender closes
_KEPT_BYTES = 16 << 20  # of receive buffer from one frame to the next
_RECORD_BYTES = 16 << 10  # of TLS: what is not larger goes out as one


class TcpEdge:
    """The sending end. Implements Edge."""

    def __init__(self, tls: ssl.SSLSocket, signs: HeartbeatSigns, peer: str, lost: Lost) -> None:
        """Takes over what `dial_tcp` opened."""
        self._tls, self._below = tls, _below(tls)
        self._number = 0
        self._sending = threading.Lock()
        self._end = End(peer, lost, lambda: _cut(self._below))
        self._watch = Watch(signs, self._end.fail, hangup=self._below)

    def send(self, message: bytes, rows: Rows = b"") -> None:
        view = memoryview(rows)
        total = len(message) + view.nbytes
        with self._sending:
            if self._end.why is not None:
                raise self._end.error()
            if total > MAX_PAYLOAD_BYTES:
                raise PipelineError(f"a message of {total} bytes, where {MAX_PAYLOAD_BYTES} go through an edge")
            head = _FRAME.pack(self._number, total)
            try:
                if total <= _RECORD_BYTES:
                    self._tls.sendall(b"".join((head, message, view)))
                else:
                    self._tls.sendall(head + message)
                    self._tls.sendall(view)
            except OSError as e:
                self._end.fail(reason(e), sending=True)
                raise self._end.error() from e
            self._number += 1

    def close(self) -> None:
        if not self._end.shut():
            return
        if self._sending.acquire(blocking=False):  # else it blocks in send, and the frame under way is cut short
            with contextlib.suppress(OSError, ValueError):
                self._tls.settimeout(0.1)
                self._tls.sendall(_FRAME.pack(self._number, _END))
            self._sending.release()
        self._watch.close()
        _cut(self._below)
        with self._sending:
            self._tls.close()
            self._below.close()


class TcpInlet:
    """The receiving end: a thread that hands each message to `deliver`."""

    def __init__(self, tls: ssl.SSLSocket, inlet: Inlet) -> None:
        """Takes over a connection whose hello was read; nothing is received before `accept`."""
        self._inlet, self._tls, self._below = inlet, tls, _below(tls)
        self._number, self._buffer = 0, bytearray()
        self._end = End(inlet.peer.name, inlet.lost, lambda: _cut(self._below))
        self._watch: Watch | None = None
        self._thread = threading.Thread(target=self._receive_all, name=f"edge {inlet.edge}", daemon=True)

    def accept(self, secrets: bytes) -> None:
        """Tell the peer that it is let in, and begin to receive. secrets: the token and key of its heartbeats."""
        self._tls.sendall(accepted(secrets))
        self._tls.settimeout(None)
        self._thread.start()

    def attach(self, pulse: socket.socket, key: bytes) -> None:
        """The peer's heartbeats come by this connection. Called once."""
        try:
            self._watch = Watch(HeartbeatSigns(pulse, key, dialled=False), self._end.fail)
        except OSError as e:
            self._end.fail(f"no heartbeat helper could be started on this host: {reason(e)}")
            return
        if self._end.why is not None:
            self._watch.close()

    def give_up(self) -> None:
        """No heartbeats came in time."""
        self._end.fail("it opened no connection for its heartbeats")

    def close(self) -> None:
        """Take in nothing more; the sender sees it. Blocks for two seconds at most."""
        if not self._end.shut():
            return
        _cut(self._below)
        if self._watch is not None:
            self._watch.close()
        self._thread.join(1.0)
        if not self._thread.is_alive():  # else it is inside `deliver`, and the process ends with it
            self._tls.close()
            self._below.close()

    def _receive_all(self) -> None:
        try:
            while (message := self._receive()) is not None:
                self._inlet.deliver(message)
        except OSError as e:
            self._end.fail(reason(e))
        except Exception as e:
            self._end.fail(f"it sent what cannot be taken in: {e}")

    def _receive(self) -> bytes | None:
        """The next message, or None when the sender has closed."""
        number, length = _FRAME.unpack(receive_exactly(self._tls, _FRAME.size))
        if number != self._number:
            raise ProtocolError(f"frame {number} where {self._number} comes next")
        if length == _END:
            return None
        if length > self._inlet.max_bytes:
            raise ProtocolError(f"a frame of {length} bytes where at most {self._inlet.max_bytes} are accepted")
        self._number += 1
        # Into memory that is there: fresh pages for each frame took longer than their decryption.
        if not length <= len(self._buffer) <= max(length, _KEPT_BYTES):
            self._buffer = bytearray(length)
        view = memoryview(self._buffer)[:length]
        _receive_into(self._tls, view)
        return bytes(view)


def dial_tcp(outlet: Outlet, epoch: int, credentials: bytes, lost: Lost) -> TcpEdge:
    """The opened edge. Raises PipelineError if the peer does not let us in, or is another node than was told."""
    host, port, keys = outlet.address.host, outlet.address.port, frozenset((outlet.peer.key,))
    where = f"{outlet.peer.name} at {host}:{port}"
    assert port is not None
    with contextlib.ExitStack() as undo:
        try:
            plain = undo.enter_context(_connect(host, port))
            tls = undo.enter_context(tls_context(credentials, keys, listens=False).wrap_socket(plain))
            peer_of(tls, keys)
            tls.sendall(Hello(epoch, outlet.edge).encode())
            head = receive_exactly(tls, 2)
            secrets = read_answer(head + receive_exactly(tls, head[1]), where)
            if len(secrets) != TOKEN_BYTES + PULSE_KEY_BYTES:
                raise PipelineError(f"{where} answered what is no acceptance")
            pulse = undo.enter_context(_connect(host, port))
            pulse.sendall(PULSE_MAGIC + secrets[:TOKEN_BYTES])
            tls.settimeout(None)
            signs = HeartbeatSigns(pulse, secrets[TOKEN_BYTES:], dialled=True)
        except ssl.SSLError as e:
            wanted = key_text(outlet.peer.key)
            raise PipelineError(f"{where} is not the node {wanted}, or does not expect this one: {reason(e)}") from e
        except OSError as e:
            raise PipelineError(f"no edge to {where}: {reason(e)}") from e
        undo.pop_all()
    return TcpEdge(tls, signs, outlet.peer.name, lost)


def receive_exactly(connection: socket.socket, n: int) -> bytes:
    """The next n bytes. Raises OSError if the connection ends before."""
    data = bytearray(n)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def reason(error: OSError) -> str:
    """What the error says, without the numbers and file names around it."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    return str(error.args[-1]) if error.args else type(error).__name__


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError(f"{ENDED}, or closed the connection without a word")
        view = view[got:]


def _connect(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), HANDSHAKE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _below(tls: ssl.SSLSocket) -> socket.socket:
    """The connection under the TLS, as a socket of its own: SSLSocket.shutdown would drop the TLS and go on without."""
    return socket.socket(fileno=os.dup(tls.fileno()))


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
