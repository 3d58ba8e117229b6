"""A name server that never answers costs no more than the time given, and one thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from shard_tools.errors import UnreachableError
from shard_tools.host_lookup import addresses
from shard_tools.http_client import HttpClient, Patience


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The C library waits for a name server as long as the test runs; gives the names it was asked for."""
    asked: list[str] = []
    over = threading.Event()
    real = socket.getaddrinfo

    def waiting(host: str, port: int, **options: int) -> object:
        if options.get("flags") == socket.AI_NUMERICHOST:
            return real(host, port, **options)
        asked.append(host)
        over.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", waiting)
    yield asked
    over.set()
    while any(thread.name == "host lookup" for thread in threading.enumerate()):
        time.sleep(0.01)


def test_a_lookup_that_hangs_ends_in_time_for_all_who_wait_and_is_made_once(stuck: list[str]) -> None:
    client = HttpClient("http://gateway.invalid", "gateway x", Patience(connect_s=0.2, answer_s=5.0))
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="did not answer within"):
            client.ask("GET", "/", "*/*", 10)
        assert time.monotonic() - began < 2
    assert stuck == ["gateway.invalid"]
    assert addresses("127.0.0.1", 80, 0.1)[0][1] == ("127.0.0.1", 80), "a number asks nobody"


def test_names_are_looked_up_and_those_without_an_address_are_said() -> None:
    assert ("127.0.0.1", 80) in [address[:2] for _, address in addresses("localhost", 80, 10)]
    client = HttpClient("http://name.invalid", "gateway x", Patience(connect_s=10))
    with pytest.raises(UnreachableError, match="gateway x cannot be asked"):
        client.ask("GET", "/", "*/*", 10)
    with pytest.raises(UnreachableError, match="gateway x cannot be asked"):
        HttpClient(f"http://{'a' * 70}.example", "gateway x", Patience()).ask("GET", "/", "*/*", 10)
