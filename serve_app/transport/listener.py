"""Awaits the edges that others open to this process: a Unix socket for its own host, TLS for the others.

It lets in the neighbours it was told of, each once, and stops listening when all have come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from serve_app.errors import PipelineError, ProtocolError
from serve_app.transport.handshake import HANDSHAKE_S, HELLO_BYTES, EdgeAddress, EdgeKind, Hello, Inlet, refused
from serve_app.transport.pulse import PULSE_KEY_BYTES
from serve_app.transport.shared_memory import SharedMemoryInlet, credentials_of
from serve_app.transport.tcp import PULSE_MAGIC, TOKEN_BYTES, TcpInlet, receive_exactly
from serve_app.transport.tls import peer_of, tls_context
from shard_tools.signing import key_text

_log = logging.getLogger(__name__)
_MAX_AT_ONCE = 32  # connections that have not proved themselves; the next one takes the place of an old one
_LOOK_S = 0.25
_MAX_HELLO_BYTES = 256
_Handle = socket.socket


class EdgeListener:
    """The inlets of one process in one epoch."""

    def __init__(
        self, epoch: int, inlets: Sequence[Inlet], host: str, credentials: bytes | None, port: int = 0
    ) -> None:
        """Listens when this returns. host: this one's address, for TCP; port: 0 for any. credentials: as tls_context

        takes them, where there is TCP. Raises PipelineError if it cannot listen.
        """
        self._epoch = epoch
        self._awaited = {inlet.edge: inlet for inlet in inlets}
        self._pulses: dict[bytes, tuple[TcpInlet, bytes, float]] = {}  # token -> inlet, key, until when
        self._open: list[SharedMemoryInlet | TcpInlet] = []
        self._closed = False
        self._lock = threading.Lock()
        # Connections that have not proved themselves, oldest first: until when they may, and from which host they are.
        # Duplicates: only to cut them. A connection that has is no longer among them, lest a neighbour be cut.
        self._strangers: dict[_Handle, tuple[float, str]] = {}
        self._entering = 0  # connections that somebody awaited came by: let in soon, or put back
        self._doors: dict[int, tuple[socket.socket, Callable[[socket.socket, _Handle], None]]] = {}
        self._unix_file: int | None = None
        self._keys = frozenset(inlet.peer.key for inlet in inlets if inlet.kind == "tcp")
        path, bound = None, None
        try:
            if any(inlet.kind == "shared_memory" for inlet in inlets):
                unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._doors[unix.fileno()] = unix, self._let_in_local
                self._unix_file = _bind_without_a_name(unix)
                path = f"/proc/{os.getpid()}/fd/{self._unix_file}"
                unix.listen()
            if self._keys:
                assert credentials is not None
                self._context = tls_context(credentials, self._keys, listens=True)
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                tcp = socket.create_server((host, port), family=family)
                self._doors[tcp.fileno()] = tcp, self._let_in_remote
                bound = tcp.getsockname()[1]
        except OSError as e:
            self._shut_doors()
            raise PipelineError(f"cannot listen for neighbours at {host}: {e}") from e
        self.address = EdgeAddress(path, host, bound)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._accept_all, name="edge-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more, and close every inlet."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            opened, self._open = self._open, []
            for handle in self._strangers:
                _cut(handle)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        for inlet in opened:
            inlet.close()

    def _accept_all(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for fd in self._doors:
            poller.register(fd, select.POLLIN)
        try:
            while not self._all_are_here():
                ready = [fd for fd, _ in poller.poll(_LOOK_S * 1000)]
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._closed:
                    return
                self._cut_overdue()
                for fd in self._doors.keys() & ready:
                    self._receive(*self._doors[fd])
        except OSError:
            _log.exception("no longer listening for neighbours")
        finally:
            self._shut_doors()
            with self._lock:
                for handle in self._strangers:
                    _cut(handle)

    def _receive(self, door: socket.socket, let_in: Callable[[socket.socket, _Handle], None]) -> None:
        connection, address = door.accept()
        handle = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            if len(self._strangers) >= _MAX_AT_ONCE:
                self._cut_one()
            self._strangers[handle] = time.monotonic() + HANDSHAKE_S, address[0] if address else ""

        def work() -> None:
            try:
                connection.settimeout(HANDSHAKE_S)
                let_in(connection, handle)
            except (OSError, PipelineError, ProtocolError) as e:
                _log.warning("a connection to an edge was refused: %s", e)
                connection.close()
            finally:
                with self._lock:
                    self._strangers.pop(handle, None)
                    if not self._closed:
                        os.eventfd_write(self._wake, 1)  # perhaps all are here now
                handle.close()

        threading.Thread(target=work, name="edge-handshake", daemon=True).start()

    def _let_in_local(self, connection: socket.socket, handle: _Handle) -> None:
        with contextlib.ExitStack() as memory, contextlib.ExitStack() as unclaimed:
            try:
                pid, uid = credentials_of(connection)
                if uid != os.geteuid():
                    raise ProtocolError(f"process {pid} is of user {uid}")
                data, fds, _, _ = socket.recv_fds(connection, _MAX_HELLO_BYTES, 1)
                for fd in fds:
                    memory.callback(os.close, fd)
                hello = Hello.decode(data)
                inlet = self._claim(hello, "shared_memory", handle)
                unclaimed.callback(self._put_back, inlet)
                if pid != inlet.peer.pid:
                    raise ProtocolError(f"process {pid} is not {inlet.peer.name}, which is process {inlet.peer.pid}")
                if not fds:
                    raise ProtocolError("no memory came with the edge")
                opened = SharedMemoryInlet(connection, hello, fds[0], inlet)
                opened.accept()
            except ProtocolError as e:
                connection.send(refused(str(e)))
                raise
            unclaimed.pop_all()
        self._keep(opened)

    def _let_in_remote(self, connection: socket.socket, handle: _Handle) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.recv(1, socket.MSG_PEEK) == PULSE_MAGIC[:1]:
            self._let_in_pulse(connection, handle)
            return
        with contextlib.ExitStack() as undo:
            tls = undo.enter_context(self._context.wrap_socket(connection, server_side=True))
            key = peer_of(tls, self._keys)
            try:
                head = receive_exactly(tls, HELLO_BYTES)
                hello = Hello.decode(head + receive_exactly(tls, Hello.name_bytes(head)))
                inlet = self._claim(hello, "tcp", handle)
                undo.callback(self._put_back, inlet)
                if key != inlet.peer.key:
                    raise ProtocolError(f"the node {key_text(key)} is not the one of {inlet.peer.name}")
            except ProtocolError as e:
                tls.sendall(refused(str(e)))
                raise
            token, pulse_key = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(PULSE_KEY_BYTES)
            opened = TcpInlet(tls, inlet)
            undo.callback(self._forget, token)
            with self._lock:
                self._pulses[token] = opened, pulse_key, time.monotonic() + HANDSHAKE_S
            opened.accept(token + pulse_key)
            undo.pop_all()
        self._keep(opened)

    def _let_in_pulse(self, connection: socket.socket, handle: _Handle) -> None:
        first = receive_exactly(connection, len(PULSE_MAGIC) + TOKEN_BYTES)
        with self._lock:
            found = self._pulses.pop(first[len(PULSE_MAGIC) :], None) if first.startswith(PULSE_MAGIC) else None
            if found is None:
                raise ProtocolError("heartbeats of no edge that was let in")
            self._enter(handle)
        opened, key, _ = found
        try:
            opened.attach(connection, key)
        finally:
            with self._lock:
                self._entering -= 1

    def _forget(self, token: bytes) -> None:
        with self._lock:
            self._pulses.pop(token, None)

    def _enter(self, handle: _Handle) -> None:
        """Called with the lock. From now on the connection's own timeout bounds what it may take."""
        self._strangers.pop(handle, None)
        self._entering += 1

    def _claim(self, hello: Hello, kind: EdgeKind, handle: _Handle) -> Inlet:
        """The inlet this hello is for, which nobody else can have now. Raises ProtocolError."""
        hello.require_epoch(self._epoch)
        with self._lock:
            inlet = self._awaited.get(hello.edge)
            if inlet is None or inlet.kind != kind:
                raise ProtocolError(f"no edge {hello.edge!r} is awaited here by this way, or it is there already")
            self._enter(handle)
            return self._awaited.pop(hello.edge)

    def _put_back(self, inlet: Inlet) -> None:
        with self._lock:
            self._entering -= 1
            self._awaited[inlet.edge] = inlet

    def _keep(self, opened: SharedMemoryInlet | TcpInlet) -> None:
        with self._lock:
            self._entering -= 1
            if not self._closed:
                self._open.append(opened)
                return
        opened.close()

    def _all_are_here(self) -> bool:
        with self._lock:
            return not self._awaited and not self._pulses and not self._entering

    def _cut_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [handle for handle, (until, _) in self._strangers.items() if now > until]
            silent = [token for token, (_, _, until) in self._pulses.items() if now > until]
            given_up = [self._pulses.pop(token)[0] for token in silent]
            for handle in late:
                _cut(handle)
        for inlet in given_up:
            inlet.give_up()

    def _cut_one(self) -> None:
        """Make room by the oldest of the host that has most: a neighbour is done in milliseconds, and who only holds

        places loses them. Called with the lock.
        """
        hosts = Counter(host for _, host in self._strangers.values())
        most = max(hosts, key=hosts.__getitem__)
        oldest = next(handle for handle, (_, host) in self._strangers.items() if host == most)
        _cut(oldest)
        del self._strangers[oldest]

    def _shut_doors(self) -> None:
        for door, _ in self._doors.values():
            door.close()
        if self._unix_file is not None:
            os.close(self._unix_file)


def _bind_without_a_name(unix: socket.socket) -> int:
    """A descriptor by which processes of this user, and no others, can reach the socket: /proc/PID/fd/N.

    Its name is gone when this returns, so a process that is killed leaves none. Not an abstract name: those have no
    permissions, any process of the host could take one. Raises OSError.
    """
    folder = tempfile.mkdtemp(prefix="llmd-")  # of mode 0700
    try:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            unix.bind(f"/proc/self/fd/{inside}/edge")  # by its own path a long TMPDIR would not fit into an address
            os.chmod("edge", 0o600, dir_fd=inside)
            return os.open("edge", os.O_PATH | os.O_CLOEXEC, dir_fd=inside)
        finally:
            os.close(inside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
