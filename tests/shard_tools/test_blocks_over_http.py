"""Gateways and peers that lie, stall, drip, flood or hang up; and requests that our own endpoint refuses."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shard_tools.block_server import MAX_HEAD_BYTES, BlockServer
from shard_tools.cid import Cid, Codec
from shard_tools.cluster_key import check_proof, create_key, load_key, proof
from shard_tools.errors import CorruptBlockError, InputError, NotFoundError, UnreachableError
from shard_tools.http_client import Patience, parse_url
from shard_tools.store.block_store import MAX_BLOCK_BYTES
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.http_source import HttpSource
from shard_tools.store.memory import MemoryStore
from tests.shard_tools.http_doubles import answering, dripping, ok, saying, silent

BLOCK = b"block" * 100
CID = Cid.of(Codec.RAW, BLOCK)
SECRET = bytes(32)
TARGET = f"/ipfs/{CID}?format=raw"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def gateway(url: str, answer_s: float = 5.0) -> HttpSource:
    return HttpSource(url, "gateway", Patience(answer_s=answer_s))


@pytest.mark.parametrize(
    "answer",
    [ok(BLOCK), CHUNKED + b"1f4\r\n" + BLOCK + b"\r\n0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n" + BLOCK],
    ids=["length", "chunked", "until-close"],
)
def test_an_honest_gateway_is_understood_however_it_frames_its_answer(answer: bytes) -> None:
    with answering(saying(answer)) as url:
        assert gateway(url).get(CID) == BLOCK


@pytest.mark.parametrize(
    "answer",
    [ok(b"wrong" * 100), ok(b""), ok(b"<html>Sign in</html>", kind="text/html"), ok(gzip.compress(BLOCK))],
    ids=["right-length", "empty", "captive-portal", "gzip"],
)
def test_a_gateway_that_lies_is_found_out(answer: bytes) -> None:
    with answering(saying(answer)) as url, pytest.raises(CorruptBlockError, match=f"gateway {url}"):
        gateway(url).get(CID)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ok(b"", size=1 << 30), "1073741824 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MAX_BLOCK_BYTES + 1), "more than 2097152 bytes"),
        (CHUNKED + b"300000\r\n" + bytes(0x300000) + b"\r\n0\r\n\r\n", "more than 2097152 bytes"),
        (ok(BLOCK[:10], size=500), "hung up 490 bytes before"),
        (b"", "cannot be asked"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be asked"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n", "cannot be asked"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "cannot be asked"),
        (b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "HTTP 301"),
        (b"HTTP/1.1 429 Slow Down\r\nContent-Length: 14\r\n\r\nslow\x1b[2J\r\ndown", r"HTTP 429: slow \[2J down"),
    ],
    ids=["1GiB", "endless", "long-chunk", "cut", "nothing", "ssh", "headers", "header", "redirect", "429"],
)
def test_an_answer_that_is_no_block_is_refused_and_says_why(answer: bytes, said: str) -> None:
    with answering(saying(answer)) as url, pytest.raises(UnreachableError, match=said):
        gateway(url).get(CID)


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        dripping(b"HTTP/1.1 200 OK\r\nx: yyyyyyyyy\r\n", 0.01),
        lambda connection: (connection.sendall(ok(b"", size=500)), dripping(b"x", 0.01)(connection)),
    ],
    ids=["silent", "drips-headers", "drips-body"],
)
def test_a_gateway_that_stalls_costs_no_more_than_its_time(answer: Callable[[socket.socket], None]) -> None:
    with answering(answer) as url:
        began = time.monotonic()
        with pytest.raises(UnreachableError, match=r"did not answer within 0\.3 s"):
            gateway(url, answer_s=0.3).get(CID)
        assert time.monotonic() - began < 2


def test_a_port_that_nobody_listens_at_is_said_at_once() -> None:
    with pytest.raises(UnreachableError, match="refused"):
        gateway("http://127.0.0.1:1").get(CID)


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:80", "http://", "http://u:p@x", "http://x?y", "http://x:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        parse_url(url)


def test_a_kept_connection_that_the_server_closed_is_replaced(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(Codec.RAW, BLOCK)
    server = BlockServer(store, "127.0.0.1", 0, None)
    source = gateway(f"http://127.0.0.1:{server.port}")
    assert source.get(CID) == BLOCK
    port = server.port
    server.close()
    with pytest.raises(UnreachableError):
        source.get(CID)
    server = BlockServer(store, "127.0.0.1", port, None)
    try:
        assert source.get(CID) == BLOCK == source.get(CID)
    finally:
        server.close()


def test_a_peer_without_the_clusters_key_is_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(Codec.RAW, BLOCK)
    server = BlockServer(store, "127.0.0.1", 0, SECRET)
    url = f"http://127.0.0.1:{server.port}"
    try:
        assert HttpSource(url, "peer", Patience(), SECRET).get(CID) == BLOCK
        for secret, said in ((None, "no proof"), (b"x" * 32, "another cluster key")):
            with pytest.raises(UnreachableError, match=f"HTTP 401: .*{said}"):
                HttpSource(url, "peer", Patience(), secret).get(CID)
    finally:
        server.close()


def test_a_proof_holds_for_one_request_about_now() -> None:
    header = proof(SECRET, "GET", TARGET, 0, 1000)
    assert check_proof(SECRET, "GET", TARGET, 0, header, 1000) is None
    assert check_proof(SECRET, "GET", TARGET, 0, header, 1120) is None
    for method, target, depth, now_s in (
        ("HEAD", TARGET, 0, 1000),
        ("GET", "/names", 0, 1000),
        ("GET", TARGET, 1, 1000),
        ("GET", TARGET, 0, 1121),
        ("GET", TARGET, 0, 879),
    ):
        assert check_proof(SECRET, method, target, depth, header, now_s) is not None
    for bad in ("", "LLMD", "LLMD x y", "Bearer 1 2", "LLMD 99999999999999999999 0", "LLMD -1 0", "LLMD \u00b2 0"):
        assert check_proof(SECRET, "GET", TARGET, 0, bad, 1000) is not None


def test_a_cluster_key_is_private_made_once_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "cluster.key"
    with pytest.raises(InputError, match="llmd blocks key"):
        load_key(path)
    create_key(path)
    assert len(load_key(path)) == 32 and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="never overwritten"):
        create_key(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        load_key(path)
    path.chmod(0o600)
    path.write_text("abc")
    with pytest.raises(InputError, match="no cluster key"):
        load_key(path)


def test_an_endpoint_without_a_key_stays_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="open to others"):
        BlockServer(DirectoryStore(tmp_path), "0.0.0.0", 0, None)


def talk(port: int, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(sent)
        s.shutdown(socket.SHUT_WR)
        out = b""
        while part := s.recv(65536):
            out += part
        return out


def test_the_endpoint_answers_what_it_serves_and_refuses_the_rest(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(Codec.RAW, BLOCK)
    server = BlockServer(store, "127.0.0.1", 0, None)
    get = f"GET /ipfs/{CID}?format=raw HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    try:
        assert talk(server.port, get).endswith(b"\r\n\r\n" + BLOCK)
        assert talk(server.port, get * 3).count(BLOCK) == 3
        head = talk(server.port, get.replace(b"GET", b"HEAD"))
        assert b"Content-Length: 500\r\n" in head and not head.endswith(BLOCK)
        for bad, status in (
            (get.replace(b"GET", b"POST"), b"405"),
            (get.replace(b"Host: x", b"Content-Length: 5") + b"hello", b"405"),
            (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /ipfs/../../etc/passwd HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /ipfs/QmW2WQi7j6c7UgJTarActp7tDNikE4B2qXtFCfLPdsgaTQ HTTP/1.1\r\n\r\n", b"400"),
            (get.replace(b"?format=raw", b"?format=car"), b"400"),
            (get.replace(b"Host: x", b"no header"), b"400"),
            (get.replace(b"Host: x", b"x-llmd-depth: many"), b"400"),
            (b"hello\r\n\r\n", b"400"),
        ):
            assert talk(server.port, bad).startswith(b"HTTP/1.1 " + status), bad
        assert talk(server.port, b"x" * (2 * MAX_HEAD_BYTES)) == b""
        assert gateway(f"http://127.0.0.1:{server.port}").get(CID) == BLOCK
    finally:
        server.close()


def test_a_block_that_the_endpoint_lacks_is_pulled_once_asked_and_not_for_a_peer_of_a_peer(tmp_path: Path) -> None:
    outside = MemoryStore()
    outside.put(Codec.RAW, BLOCK)
    server = BlockServer(DirectoryStore(tmp_path), "127.0.0.1", 0, SECRET, pull=outside)
    url = f"http://127.0.0.1:{server.port}"
    try:
        assert HttpSource(url, "peer", Patience(), SECRET).get(CID) == BLOCK
        with pytest.raises(NotFoundError):
            HttpSource(url, "peer", Patience(), SECRET, depth=1).get(CID)
        with pytest.raises(NotFoundError, match="memory"):
            HttpSource(url, "peer", Patience(), SECRET).get(Cid.of(Codec.RAW, b"nowhere"))
    finally:
        server.close()


def test_many_threads_share_one_source(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    cids = [store.put(Codec.RAW, bytes([i]) * 50_000) for i in range(32)]
    server = BlockServer(store, "127.0.0.1", 0, SECRET)
    source = HttpSource(f"http://127.0.0.1:{server.port}", "peer", Patience(), SECRET)
    wrong: list[Cid] = []

    def read() -> None:
        for i, cid in enumerate(cids):
            if source.get(cid) != bytes([i]) * 50_000:
                wrong.append(cid)

    threads = [threading.Thread(target=read) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong and not any(thread.is_alive() for thread in threads)
    finally:
        source.close()
        server.close()
