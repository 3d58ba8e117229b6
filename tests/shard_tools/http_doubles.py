"""Servers that answer as no honest node would, on loopback: each gives every connection to one function."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[socket.socket], None]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server of such handlers, a thread for each connection."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server that calls `answer` with each connection once it has read a request's head."""
    listener = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                more = connection.recv(4096)
                if not more:
                    return
                head += more
            answer(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                opened.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in opened:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def ok(body: bytes, size: int | None = None, kind: str = "application/vnd.ipld.raw") -> bytes:
    """A whole answer; size: what its Content-Length says, if not the truth."""
    length = len(body) if size is None else size
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode() + body


def saying(data: bytes) -> Answer:
    """Sends this, and hangs up."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(data)

    return answer


def dripping(data: bytes, every_s: float) -> Answer:
    """Sends this one byte at a time, over and over."""

    def answer(connection: socket.socket) -> None:
        pause = threading.Event()
        while True:
            for byte in data:
                connection.sendall(bytes([byte]))
                pause.wait(every_s)

    return answer


def silent(connection: socket.socket) -> None:
    """Takes the request and says nothing until the client has gone."""
    connection.recv(1)
