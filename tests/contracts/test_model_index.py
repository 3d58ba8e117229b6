"""The laws of ModelIndex, over every implementation.

Run from outside: give the fixture `index` and import the rest; see tests/contracts/README.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_tools.cid import Cid, Codec
from shard_tools.errors import NotFoundError
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.memory import MemoryIndex
from shard_tools.index.model_index import ModelIndex, ModelRecord

RECORD = ModelRecord(Cid.of(Codec.DAG_CBOR, b"m"), Cid.of(Codec.DAG_CBOR, b"s"))
OTHER = ModelRecord(Cid.of(Codec.DAG_CBOR, b"m2"), Cid.of(Codec.DAG_CBOR, b"s2"))


@pytest.fixture(params=["memory", "directory"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> ModelIndex:
    """An empty index."""
    return MemoryIndex() if request.param == "memory" else DirectoryIndex(tmp_path)


def test_a_name_means_the_record_last_published(index: ModelIndex) -> None:
    index.publish("org/model", RECORD, lambda _: True)
    index.publish("org/model", OTHER, lambda _: True)
    index.publish("a", RECORD, lambda _: True)
    assert index.resolve("org/model") == OTHER
    assert index.names() == ("a", "org/model")


def test_an_unknown_name_is_said_to_be_missing(index: ModelIndex) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        index.resolve("nope")


@pytest.mark.parametrize("missing", [RECORD.manifest, RECORD.signature])
def test_a_name_never_points_at_what_is_not_there(index: ModelIndex, missing: Cid) -> None:
    index.publish("model", OTHER, lambda _: True)
    with pytest.raises(NotFoundError, match=str(missing)):
        index.publish("model", RECORD, lambda cid: cid != missing)
    assert index.resolve("model") == OTHER
