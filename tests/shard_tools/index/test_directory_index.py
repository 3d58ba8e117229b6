"""What a directory of names keeps beyond the laws of every index."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.model_index import ModelRecord

RECORD = ModelRecord(Cid.of(Codec.DAG_CBOR, b"m"), Cid.of(Codec.DAG_CBOR, b"s"))


def test_a_name_cannot_leave_its_directory(tmp_path: Path) -> None:
    index = DirectoryIndex(tmp_path / "in")
    with pytest.raises(InputError):
        index.publish("../out", RECORD, lambda _: True)
    index.publish("x/../../out", RECORD, lambda _: True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    index = DirectoryIndex(tmp_path)
    index.publish("model", RECORD, lambda _: True)
    path = tmp_path / "names" / "model"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        index.resolve("model")
