"""An edge between two processes of one host: rows through memory that both map, a Unix socket as doorbell.

Small messages go through the socket itself, larger ones through a ring of bytes; the socket then carries where they
lie. So positions in the ring never lie in shared memory: the socket orders what was written before what is said of it,
on any processor, and a reader sleeps in the kernel instead of spinning (on two cores a spinning reader takes one of
them from the engine). A message larger than the ring passes in pieces, each freed as soon as it is copied out.

The ring is a memfd that the sender makes and passes over the socket, not a name in /dev/shm: with the last of the two
processes it is gone, however they end. It is sealed, so neither side can make it shorter under the other's hands.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading

from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import MAX_PAYLOAD_BYTES
from serve_app.transport.edge import Lost, Rows
from serve_app.transport.handshake import HANDSHAKE_S, MAX_ANSWER_BYTES, Hello, Inlet, Outlet, accepted, read_answer
from serve_app.transport.liveness import End, ProcessSigns, Watch
from serve_app.transport.pulse import ENDED

RING_BYTES = 8 << 20  # two steps of 512 prompt rows of width 4096 in bfloat16
INLINE_BYTES = 16 << 10  # through the socket
_MAX_RING_BYTES = 1 << 30
_PAGE = mmap.PAGESIZE  # behind the ring; its first byte is set when the sender closes in good order
_CREDITS = 8  # the receiver says what is free each time it has emptied one of so many parts of the ring
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_RECORD = struct.Struct("<BQIQI")  # kind, number of the message, its bytes, position in the ring, bytes there
_INLINE, _PIECE, _END = 1, 2, 3
_FREE = struct.Struct("<Q")  # from the receiver: the position up to which it has copied out
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def credentials_of(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class SharedMemoryEdge:
    """The sending end. Implements Edge."""

    def __init__(
        self, connection: socket.socket, ring: mmap.mmap, size: int, signs: ProcessSigns, peer: str, lost: Lost
    ) -> None:
        """Takes over what `dial_shared_memory` opened."""
        self._socket, self._ring, self._size = connection, ring, size
        self._written, self._freed, self._number = 0, 0, 0
        self._sending = threading.Lock()
        self._end = End(peer, lost, lambda: _cut(self._socket))
        self._watch = Watch(signs, self._end.fail, hangup=self._socket)

    def send(self, message: bytes, rows: Rows = b"") -> None:
        total = len(message) + memoryview(rows).nbytes
        with self._sending:
            if self._end.why is not None:
                raise self._end.error()
            if total > MAX_PAYLOAD_BYTES:
                raise PipelineError(f"a message of {total} bytes, where {MAX_PAYLOAD_BYTES} go through an edge")
            try:
                if total <= INLINE_BYTES:
                    self._socket.sendmsg([_RECORD.pack(_INLINE, self._number, total, 0, 0), message, rows])
                else:
                    self._send_pieces(total, message, rows)
            except (OSError, ProtocolError) as e:
                why = e.strerror or str(e) if isinstance(e, OSError) else str(e)
                self._end.fail(why, sending=True)
                raise self._end.error() from e
            self._number += 1

    def close(self) -> None:
        if not self._end.shut():
            return
        self._ring[self._size] = 1
        with contextlib.suppress(OSError):
            self._socket.send(_RECORD.pack(_END, self._number, 0, 0, 0), socket.MSG_DONTWAIT)
        self._watch.close()
        _cut(self._socket)
        with self._sending:
            self._socket.close()
            self._ring.close()

    def _send_pieces(self, total: int, *parts: Rows) -> None:
        for part in parts:
            view = memoryview(part)
            rest = view.cast("B") if view.nbytes else memoryview(b"")
            while len(rest):
                offset = self._written % self._size
                most = min(len(rest), self._size - offset)
                self._await_room(min(most, self._size // 4))
                n = min(most, self._size - (self._written - self._freed))
                self._ring[offset : offset + n] = rest[:n]
                self._socket.send(_RECORD.pack(_PIECE, self._number, total, self._written, n))
                self._written += n
                rest = rest[n:]

    def _await_room(self, n: int) -> None:
        while self._size - (self._written - self._freed) < n:
            packet = self._socket.recv(_FREE.size)
            if not packet:
                raise ConnectionResetError("the connection ended")
            (freed,) = _FREE.unpack(packet) if len(packet) == _FREE.size else (0,)
            if not self._freed < freed <= self._written:
                raise ProtocolError(f"it frees the ring up to {freed}; in use is {self._freed} to {self._written}")
            self._freed = freed


class SharedMemoryInlet:
    """The receiving end: a thread that hands each message to `deliver`."""

    def __init__(self, connection: socket.socket, hello: Hello, memory: int, inlet: Inlet) -> None:
        """Takes over a connection whose hello was read; nothing is received before `accept`.

        memory: the descriptor that came with it; it stays the caller's. Raises ProtocolError for a ring that is none.
        """
        self._inlet, self._socket, self._size = inlet, connection, hello.ring_bytes
        try:
            seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
        except OSError as e:
            raise ProtocolError(f"a ring in something that is no memfd: {e.strerror}") from e
        if seals & _SEALS != _SEALS:
            raise ProtocolError("a ring that its sender could make shorter while it is read")
        found = os.fstat(memory).st_size  # asked once it is sealed: before, it may change after the answer
        if not _PAGE <= hello.ring_bytes <= _MAX_RING_BYTES or found != hello.ring_bytes + _PAGE:
            raise ProtocolError(f"a ring said to have {hello.ring_bytes} bytes, in {found} bytes of memory")
        self._ring = mmap.mmap(memory, hello.ring_bytes + _PAGE, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._number, self._position, self._credited = 0, 0, 0
        self._end = End(inlet.peer.name, inlet.lost, lambda: _cut(self._socket))
        self._signs = ProcessSigns(inlet.peer.pid, closed=lambda: self._ring[self._size] == 1)
        self._thread = threading.Thread(target=self._receive_all, name=f"edge {inlet.edge}", daemon=True)

    def accept(self) -> None:
        """Tell the peer that it is let in, and begin to receive."""
        try:
            self._socket.send(accepted())
        except OSError:
            self._signs.close()
            raise
        self._socket.settimeout(None)
        self._watch = Watch(self._signs, self._end.fail)
        self._thread.start()

    def close(self) -> None:
        """Take in nothing more; the sender sees it. Blocks for a second at most."""
        if not self._end.shut():
            return
        _cut(self._socket)
        self._watch.close()
        self._thread.join(1.0)
        if not self._thread.is_alive():  # else it is inside `deliver`, and the process ends with it
            self._socket.close()
            self._ring.close()

    def _receive_all(self) -> None:
        try:
            while (message := self._receive()) is not None:
                self._inlet.deliver(message)
        except OSError as e:
            self._end.fail(e.strerror or str(e))
        except Exception as e:
            self._end.fail(f"it sent what cannot be taken in: {e}")

    def _receive(self) -> bytes | None:
        """The next message, or None when the sender has closed."""
        pieces: list[bytes] = []
        whole = missing = -1
        while missing:
            packet = self._socket.recv(_RECORD.size + INLINE_BYTES)
            if not packet and not pieces and self._ring[self._size] == 1:
                return None  # it closed while nothing more went into the socket
            if len(packet) < _RECORD.size:
                raise ConnectionResetError(ENDED if not packet else "a record was cut short")
            kind, number, total, position, size = _RECORD.unpack_from(packet)
            if number != self._number:
                raise ProtocolError(f"message {number} where {self._number} comes next")
            if total > self._inlet.max_bytes:
                raise ProtocolError(f"a message of {total} bytes where at most {self._inlet.max_bytes} are accepted")
            if kind == _END and not pieces:
                return None
            if kind == _INLINE and not pieces and len(packet) == _RECORD.size + total:
                self._number += 1
                return packet[_RECORD.size :]
            if not pieces:
                whole = missing = total
            offset = position % self._size
            fits = 0 < size <= missing and position == self._position and offset + size <= self._size
            if kind != _PIECE or not fits or total != whole:
                raise ProtocolError(f"a record that does not continue message {number}")
            pieces.append(self._ring[offset : offset + size])
            missing -= size
            self._position += size
            if self._position - self._credited >= self._size // _CREDITS:
                self._socket.send(_FREE.pack(self._position))
                self._credited = self._position
        self._number += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def dial_shared_memory(outlet: Outlet, epoch: int, lost: Lost, ring_bytes: int = RING_BYTES) -> SharedMemoryEdge:
    """The opened edge. Raises PipelineError if the peer does not let us in, or is another process than was told."""
    name, path = outlet.peer.name, outlet.address.path
    assert path is not None
    with contextlib.ExitStack() as undo:
        try:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(HANDSHAKE_S)
            connection.connect(path)
            pid, uid = credentials_of(connection)
            if (pid, uid) != (outlet.peer.pid, os.geteuid()):
                raise PipelineError(
                    f"{path} is held by process {pid} of user {uid}, and not by {name}, which is {outlet.peer.pid}"
                )
            memory = os.memfd_create("llmd-edge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(memory, ring_bytes + _PAGE)
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
                ring = undo.enter_context(
                    mmap.mmap(memory, ring_bytes + _PAGE, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
                )
                socket.send_fds(connection, [Hello(epoch, outlet.edge, ring_bytes).encode()], [memory])
            finally:
                os.close(memory)
            read_answer(connection.recv(MAX_ANSWER_BYTES), name)
            connection.settimeout(None)
            signs = ProcessSigns(pid, closed=lambda: False)
        except OSError as e:
            raise PipelineError(f"no edge to {name} by {path}: {e.strerror or e}") from e
        undo.pop_all()
    return SharedMemoryEdge(connection, ring, ring_bytes, signs, name, lost)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
