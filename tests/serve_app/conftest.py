"""A real uvicorn on loopback, with the echo generator behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from serve_app.api.app import create_app
from serve_app.api.auth import ApiKeys
from serve_app.api.echo import EchoGenerator
from serve_app.api.generator import Generator
from tests.serve_app.api.echo_server import MODEL, Serve, Server, eventually


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Starts a server; all are stopped at the end."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(generator: Generator | None = None, keys: ApiKeys | None = None, **options: int) -> Server:
        generator = generator or EchoGenerator()
        app = create_app({MODEL.name: MODEL}, generator, keys or ApiKeys(), **options)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        eventually(lambda: server.started)
        return Server(f"http://127.0.0.1:{listening.getsockname()[1]}", generator)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(10)


@pytest.fixture(scope="session")
def server(serve: Serve) -> Server:
    """One server that most tests share."""
    return serve()
