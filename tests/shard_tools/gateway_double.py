"""A trustless gateway on loopback, as the specification has it: raw blocks, and files as CARs in depth-first order.

    python -m tests.shard_tools.gateway_double FOLDER [--delay-ms 5] [--no-cars]

serves the store in FOLDER, says its port, and ends with its standard input. --delay-ms: what goes in and what comes out
is late by so much, as over a distance; bandwidth is not limited.
Source: https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

from __future__ import annotations

import argparse
import queue
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import parse_qs, urlsplit

from shard_tools.cid import Cid, Codec
from shard_tools.errors import LlmdError
from shard_tools.store.car import write_car
from shard_tools.store.directory import DirectoryStore
from shard_tools.unixfs import node_links
from tests.shard_tools.http_doubles import serving

RAW, CAR = "application/vnd.ipld.raw", "application/vnd.ipld.car"


class Blocks(Protocol):
    def get(self, cid: Cid) -> bytes: ...


class Log:
    """What the gateway was asked for: `raw` and `car`, how often; and with which query each CAR."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.cars: list[tuple[str, dict[str, list[str]], str]] = []


@contextmanager
def gateway(
    blocks: Blocks, cars: bool = True, cut: Callable[[BinaryIO], BinaryIO] | None = None
) -> Iterator[tuple[str, Log]]:
    """The address of a gateway over the blocks, and its log. cut: stands between a CAR and the connection."""
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            wanted = query.get("format", [self.headers["Accept"]])[0]
            try:
                cid = Cid.parse(parts.path.removeprefix("/ipfs/"))
                if wanted == "car":
                    log.asked["car"] += 1
                    log.cars.append((str(cid), query, self.headers["Accept"]))
                    self._car(cid)
                else:
                    log.asked["raw"] += 1
                    self._whole(200, RAW, blocks.get(cid))
            except LlmdError as e:
                self._whole(404, "text/plain", str(e).encode())

        def _car(self, root: Cid) -> None:
            if not cars:
                self._whole(406, "text/plain", b"no CARs here")
                return
            blocks.get(root)
            self.send_response(200)
            self.send_header("Content-Type", f"{CAR}; version=1; order=dfs; dups=n")
            self.send_header("Connection", "close")  # its length is not known before its end
            self.end_headers()
            out: BinaryIO = self.wfile if cut is None else cut(self.wfile)
            with suppress(BrokenPipeError, ConnectionResetError):
                write_car(out, [root], walked(root, blocks))
            self.close_connection = True

        def _whole(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, log


def walked(root: Cid, blocks: Blocks) -> Iterator[tuple[Cid, bytes]]:
    """Every block of a file, depth first, each once."""
    seen: set[Cid] = set()
    stack = [root]
    while stack:
        cid = stack.pop()
        if cid in seen:
            continue
        seen.add(cid)
        block = blocks.get(cid)
        yield cid, block
        if cid.codec is Codec.DAG_PB:
            stack += [link.cid for link in reversed(node_links(block))]


@contextmanager
def far_away(port: int, delay_s: float) -> Iterator[int]:
    """A port behind which `port` answers, everything late by delay_s each way."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def pump(source: socket.socket, target: socket.socket) -> None:
        late: queue.Queue[tuple[float, bytes]] = queue.Queue()

        def send() -> None:
            with suppress(OSError):
                while True:
                    at, data = late.get()
                    time.sleep(max(0.0, at - time.monotonic()))
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(data)

        threading.Thread(target=send, daemon=True).start()
        data = b"x"
        while data:
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            late.put((time.monotonic() + delay_s, data))

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                for a, b in ((near, far), (far, near)):
                    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=pump, args=(a, b), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--no-cars", action="store_true")
    a = parser.parse_args()
    with gateway(DirectoryStore.mirror(a.folder), cars=not a.no_cars) as (url, _):
        port = int(url.rpartition(":")[2])
        with far_away(port, a.delay_ms / 1000) as late:
            print(late if a.delay_ms else port, flush=True)
            sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
