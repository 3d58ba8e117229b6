"""What does the load client itself cost? Against a server that only writes the time into every piece it sends.

    python -m benchmarks.client_overhead [--streams 32] [--events-per-s 20]

That server is a process of its own on the same clock, so the age of a piece when the client has parsed it is socket,
scheduling and client together: no latency below it can be told from zero by benchmarks/serving.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import http_client
from benchmarks.report import Result, save
from benchmarks.spread import percentiles

_WIDTH = 20  # characters of a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--events-per-s", type=float, default=20.0, help="of each stream")
    parser.add_argument("--events", type=int, default=60, help="of each stream")
    parser.add_argument("--serve", action="store_true", help="used by itself")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    if a.serve:
        asyncio.run(_serve())
        return 0
    save(Result("client_overhead", measured(a.streams, a.events_per_s, a.events)), a.out)
    return 0


def measured(streams: int, events_per_s: float, events: int) -> dict[str, Any]:
    """Age of pieces when parsed, in ms, and processor time of the client per piece, in us."""
    command = [sys.executable, "-m", "benchmarks.client_overhead", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            ages, cpu_s = asyncio.run(_ask_all(port, streams, events_per_s, events))
        finally:
            server.kill()
    return {
        "streams": streams,
        "events_per_s_each": events_per_s,
        "age_ms": percentiles(ages, 2),
        "client_cpu_us_per_event": round(cpu_s / len(ages) * 1e6, 1),
    }


async def _ask_all(port: int, streams: int, events_per_s: float, events: int) -> tuple[list[float], float]:
    url, body = f"http://127.0.0.1:{port}", {"every_s": 1 / events_per_s, "events": events}
    cpu = time.process_time()
    replies = await asyncio.gather(*(http_client.ask(url, "/v1/completions", body) for _ in range(streams)))
    cpu_s = time.process_time() - cpu
    ages = []
    for reply in replies:
        assert reply.error is None, reply.error
        written = [float(reply.text[i : i + _WIDTH]) for i in range(0, len(reply.text), _WIDTH)]
        ages += [(came - left) * 1e3 for came, left in zip(reply.piece_s, written, strict=True)]
    return ages, cpu_s


async def _serve() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent is gone


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    asked = json.loads(await reader.readexactly(length))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    began = time.perf_counter()
    for i in range(asked["events"]):
        await asyncio.sleep(max(0.0, began + i * asked["every_s"] - time.perf_counter()))
        now = f"{time.perf_counter():0{_WIDTH}.9f}"
        # As long as a chunk of our own server.
        chunk = {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion.chunk", "created": 0, "model": "overhead"}
        _chunk(writer, json.dumps({**chunk, "choices": [{"index": 0, "text": now, "finish_reason": None}]}))
        await writer.drain()
    _chunk(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


def _chunk(writer: asyncio.StreamWriter, event: str) -> None:
    data = f"data: {event}\n\n".encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


if __name__ == "__main__":
    sys.exit(main())
