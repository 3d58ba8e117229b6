"""Two ways into one local pipeline for the soak: its own interface with the API's text layer, or real HTTP on loopback.

Either asks for a greedy completion of token ids, may hang up in the middle, and says what came and when.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import uvicorn

from benchmarks import http_client
from benchmarks.models import PublishedModel, greedy
from serve_app.api.answer import Answer
from serve_app.api.app import create_app
from serve_app.api.auth import ApiKeys
from serve_app.api.generator import ServedModel
from serve_app.errors import OverloadedError
from serve_app.local import LocalPipeline
from serve_app.receipts.bundle import bytes_of_text
from shard_tools.errors import LlmdError

OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the soak."""

    prompt: tuple[int, ...]
    tokens: int
    stop: str | None = None
    hang_up_after: int | None = None  # pieces of text


@dataclass(frozen=True, slots=True)
class Got:
    """What became of it. receipt: empty if we hung up. error: OVERLOADED, or what went wrong."""

    text: str
    receipt: bytes
    first_s: float | None  # from asking to the first text
    hung_up: bool
    error: str | None


class Door(Protocol):
    """A way in."""

    async def ask(self, asked: Asked, timeout_s: float) -> Got:
        """Ask, and wait for the end. Never raises for what the pipeline does."""

    async def close(self) -> None:
        """Nothing of it is left."""


class LocalDoor:
    """LocalPipeline.generate behind api/answer.py, as an ingress uses it."""

    def __init__(self, pipeline: LocalPipeline, model: PublishedModel) -> None:
        self._pipeline, self._model = pipeline, model

    async def ask(self, asked: Asked, timeout_s: float) -> Got:
        request = greedy(self._model.manifest, asked.prompt, asked.tokens, self._model.text.stop_ids)
        stops = (asked.stop,) if asked.stop else ()
        answer = Answer(self._pipeline, request, self._model.text.decoder(), stops)
        began, first, text, pieces = time.perf_counter(), None, "", 0
        try:
            async with asyncio.timeout(timeout_s):
                await answer.start()
                first = time.perf_counter() - began
                async for piece in answer.pieces():
                    text, pieces = text + piece, pieces + 1
                    if asked.hang_up_after is not None and pieces >= asked.hang_up_after:
                        return Got(text, b"", first, True, None)
                return Got(text, answer.end.receipt, first, False, None)
        except TimeoutError:
            return Got(text, b"", first, False, f"no end after {timeout_s:.0f} s")
        except OverloadedError:
            return Got("", b"", None, False, OVERLOADED)
        except LlmdError as e:
            return Got(text, b"", first, False, f"{type(e).__name__}: {e}")
        finally:
            await answer.close()

    async def close(self) -> None:
        pass


class HttpDoor:
    """The same application that an ingress serves, by uvicorn in this event loop, asked through a socket."""

    def __init__(self, pipeline: LocalPipeline, model: PublishedModel) -> None:
        manifest = model.manifest
        served = ServedModel(manifest.name, manifest.cid, manifest.context_length, int(time.time()), model.text)
        app = create_app({manifest.name: served}, pipeline, ApiKeys())
        self._name = manifest.name
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def ask(self, asked: Asked, timeout_s: float) -> Got:
        body: Mapping[str, Any] = {
            "model": self._name,
            "prompt": list(asked.prompt),
            "max_tokens": asked.tokens,
            "temperature": 0,
            "stream": True,
            **({"stop": asked.stop} if asked.stop else {}),
        }
        reply = await http_client.ask(
            self._url, "/v1/completions", body, hang_up_after=asked.hang_up_after, timeout_s=timeout_s
        )
        first = reply.piece_s[0] - reply.sent_s if reply.piece_s else None
        error = OVERLOADED if reply.status == 429 else reply.error
        return Got(reply.text, bytes_of_text(reply.receipt or ""), first, reply.hung_up, error)

    async def close(self) -> None:
        self._server.should_exit = True
        await self._serving
