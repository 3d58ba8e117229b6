"""What tests of the HTTP side share: a model of bytes, a running server, patience with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import openai

from serve_app.api.generator import Generator, ServedModel
from shard_tools.cid import Cid, Codec
from shard_tools.manifest import ModelName
from tests.serve_app.api.bytes_text import BytesText

MODEL = ServedModel(ModelName("echo"), Cid.of(Codec.DAG_CBOR, b"echo"), 4096, 1_700_000_000, BytesText())


@dataclass
class Server:
    """A running server and the generator behind it."""

    url: str
    generator: Generator

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def openai(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)


Serve = Callable[..., Server]


def eventually(true: Callable[[], bool], timeout_s: float = 10) -> None:
    """Returns as soon as `true()` holds; fails the test when it never does."""
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, "never became true"
        time.sleep(0.005)
