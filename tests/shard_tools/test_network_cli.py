"""Fetching from peers, gateways, mirrors and by HTTP names, as a person types it; and the endpoint, as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shard_tools.errors import FormatError, InputError, NotFoundError, UnreachableError
from shard_tools.fetch import load_manifest, verify
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.http import HttpIndex
from shard_tools.index.model_index import ModelRecord
from shard_tools.store.directory import DirectoryStore
from tests.shard_tools.http_doubles import answering, ok, saying
from tests.shard_tools.test_cli import Desk, cid_of, refusal
from tests.tiny_models import write_tiny_checkpoint

COMMAND = "import typer; from shard_tools.cli import register; app = typer.Typer(); register(app); app()"


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk that has published org/tiny, and has a cluster key."""
    desk = Desk(tmp_path_factory.mktemp("publisher"))
    folder = write_tiny_checkpoint(desk.root / "ck", layers=2)
    assert desk.run("publish", folder, "--name", "org/tiny").exit_code == 0
    assert desk.run("blocks", "key", "--cluster-key", cluster_key(desk)).exit_code == 0
    return desk


def cluster_key(desk: Desk) -> Path:
    return desk.root / "cluster.key"


@contextmanager
def served(desk: Desk, *words: object) -> Iterator[str]:
    """The address of `llmd blocks serve` of this desk."""
    command = [sys.executable, "-c", COMMAND, "blocks", "serve", "--listen", "127.0.0.1:0", "--store", str(desk.store)]
    process = subprocess.Popen([*command, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout is not None
    said = process.stdout.readline()
    try:
        assert "Serving" in said
        yield said.split(" at ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def whole(desk: Desk) -> bool:
    store = DirectoryStore(desk.store)
    return verify(store, load_manifest(store, DirectoryIndex(desk.store).resolve("org/tiny").manifest)) == []


def test_a_model_is_fetched_by_name_from_a_node_of_the_cluster(publisher: Desk, tmp_path: Path) -> None:
    key, other = cluster_key(publisher), Desk(tmp_path / "other")
    trust = ("--trust", publisher.key.with_suffix(".pub"))
    with served(publisher, "--cluster-key", key) as url:
        fetched = other.run("fetch", "org/tiny", "--peer", url, "--cluster-key", key, *trust)
        assert fetched.exit_code == 0, fetched.output
        assert cid_of(fetched.stdout) in publisher.run("ls").stdout and whole(other)
        assert "Known: org/tiny" in refusal(other.run("fetch", "org/x", "--peer", url, "--cluster-key", key, *trust))
        stranger = tmp_path / "stranger.key"
        other.run("blocks", "key", "--cluster-key", stranger)
        said = refusal(Desk(tmp_path / "s").run("fetch", "org/tiny", "--peer", url, "--cluster-key", stranger, *trust))
        assert "another cluster key" in said


def test_a_node_that_lacks_a_model_gets_it_from_outside_for_who_asks(publisher: Desk, tmp_path: Path) -> None:
    """The node keeps what it got: it is then there without the outside."""
    node, other = Desk(tmp_path / "node"), Desk(tmp_path / "other")
    key, trust = cluster_key(publisher), ("--trust", publisher.key.with_suffix(".pub"))
    with served(node, "--cluster-key", key, "--mirror", publisher.store) as url:
        words = ("--peer", url, "--cluster-key", key, "--index", publisher.store, *trust)
        assert other.run("fetch", "org/tiny", *words).exit_code == 0
    assert whole(other)
    leaves = {cid for cid in DirectoryStore(other.store).cids() if cid.codec == 0x55}
    assert len(leaves & set(DirectoryStore(node.store).cids())) > 20


def test_a_model_is_fetched_by_cid_from_any_gateway_without_a_name(publisher: Desk, tmp_path: Path) -> None:
    other = Desk(tmp_path / "other")
    cid = cid_of(publisher.run("ls").stdout)
    with served(publisher, "--public") as url:
        fetched = other.run("fetch", cid, "--gateway", "http://127.0.0.1:1", "--gateway", url)
        assert fetched.exit_code == 0 and "not named" in fetched.stdout, fetched.output
    assert other.run("verify", cid).exit_code == 0


def test_any_web_server_over_a_store_is_an_index(publisher: Desk, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(publisher.store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        other = Desk(tmp_path / "other")
        words = ("--index", url, "--mirror", publisher.store, "--trust", publisher.key.with_suffix(".pub"))
        assert other.run("fetch", "org/tiny", *words).exit_code == 0
        assert whole(other)
        with pytest.raises((FormatError, UnreachableError)):  # a page for people, or a redirect to one
            HttpIndex(url).names()
    finally:
        server.terminate()
        server.wait(10)


def test_what_cannot_be_fetched_says_why_and_what_to_do(publisher: Desk, tmp_path: Path) -> None:
    other, cid = Desk(tmp_path / "other"), "bafyreih" + "a" * 51
    mirror, trust = publisher.store, ("--trust", publisher.key.with_suffix(".pub"))
    assert "say where from" in refusal(other.run("fetch", "org/tiny"))
    assert "leave out" in refusal(other.run("fetch", "x", "--from", publisher.store, "--mirror", mirror))
    assert "--index" in refusal(other.run("fetch", "org/tiny", "--mirror", mirror, *trust))
    assert "is no IPNS name" in refusal(other.run("fetch", "x", "--mirror", mirror, "--index", "k51", *trust))
    assert "relative" in refusal(other.run("fetch", cid, "--mirror", "store"))
    said = refusal(other.run("fetch", cid_of(publisher.run("ls").stdout), "--gateway", "http://127.0.0.1:1"))
    assert "gateway http://127.0.0.1:1: cannot be asked: Connection refused" in said
    assert "expected HOST:PORT" in refusal(other.run("blocks", "serve", "--listen", "8190"))
    assert "leave one of them out" in refusal(other.run("blocks", "serve", "--public", "--peer", "http://x:1"))
    assert "llmd blocks key" in refusal(other.run("blocks", "serve", "--cluster-key", tmp_path / "none"))
    assert "open to others" in refusal(other.run("blocks", "serve", "--listen", "0.0.0.0:0", "--public"))


def test_an_index_that_answers_with_something_else_is_refused() -> None:
    for data, error in (
        (ok(b"<html>404</html>"), FormatError),
        (ok(bytes(5000)), UnreachableError),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", NotFoundError),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", UnreachableError),
        (b"", UnreachableError),
    ):
        with answering(saying(data)) as url, pytest.raises(error):
            HttpIndex(url).resolve("org/m")
    record = ModelRecord.decode
    with pytest.raises(InputError, match="is only read"):
        HttpIndex("http://127.0.0.1:1").publish("m", record, lambda _: True)  # type: ignore[arg-type]
