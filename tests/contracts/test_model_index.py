"""The laws of ModelIndex, over every implementation.

Run from outside: give the fixture `index` and import the rest; see tests/contracts/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_tools.block_server import BlockServer
from shard_tools.cid import Cid, Codec
from shard_tools.errors import NotFoundError
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.http import HttpIndex
from shard_tools.index.memory import MemoryIndex
from shard_tools.index.model_index import ModelIndex, ModelRecord
from shard_tools.store.directory import DirectoryStore

RECORD = ModelRecord(Cid.of(Codec.DAG_CBOR, b"m"), Cid.of(Codec.DAG_CBOR, b"s"))
OTHER = ModelRecord(Cid.of(Codec.DAG_CBOR, b"m2"), Cid.of(Codec.DAG_CBOR, b"s2"))


@pytest.fixture(params=["memory", "directory", "http"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelIndex]:
    """An empty index."""
    if request.param != "http":
        yield MemoryIndex() if request.param == "memory" else DirectoryIndex(tmp_path)
        return
    server = BlockServer(DirectoryStore(tmp_path), "127.0.0.1", 0, None, names=DirectoryIndex(tmp_path))
    yield HttpIndex(f"http://127.0.0.1:{server.port}")
    server.close()


@pytest.fixture
def publisher(index: ModelIndex, tmp_path: Path) -> ModelIndex:
    """Where names are published that `index` resolves: itself, unless it is only read."""
    return DirectoryIndex(tmp_path) if isinstance(index, HttpIndex) else index


def test_a_name_means_the_record_last_published(index: ModelIndex, publisher: ModelIndex) -> None:
    publisher.publish("org/model", RECORD, lambda _: True)
    publisher.publish("org/model", OTHER, lambda _: True)
    publisher.publish("a", RECORD, lambda _: True)
    assert index.resolve("org/model") == OTHER
    assert index.names() == ("a", "org/model")


def test_an_unknown_name_is_said_to_be_missing(index: ModelIndex) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        index.resolve("nope")


@pytest.mark.parametrize("missing", [RECORD.manifest, RECORD.signature])
def test_a_name_never_points_at_what_is_not_there(index: ModelIndex, publisher: ModelIndex, missing: Cid) -> None:
    publisher.publish("model", OTHER, lambda _: True)
    with pytest.raises(NotFoundError, match=str(missing)):
        publisher.publish("model", RECORD, lambda cid: cid != missing)
    assert index.resolve("model") == OTHER
