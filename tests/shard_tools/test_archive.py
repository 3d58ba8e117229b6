"""A model in one file: out, in, and what is not a whole model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from shard_tools.archive import export_model, import_model
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, NotFoundError
from shard_tools.fetch import load_manifest, verify
from shard_tools.index.memory import MemoryIndex
from shard_tools.index.model_index import ModelRecord
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.store.car import read_car, write_car
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, ModelRecord]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("ck"), layers=2)
    store = MemoryStore()
    return store, publish(folder, store, MemoryIndex(), "tiny", Signer.from_seed(bytes(32)))


@pytest.fixture(scope="module")
def whole(published: tuple[MemoryStore, ModelRecord]) -> bytes:
    out = io.BytesIO()
    store, record = published
    export_model(store, record.manifest, record.signature, out)
    return out.getvalue()


def test_a_model_comes_out_of_its_file_with_all_blocks_and_no_others(
    published: tuple[MemoryStore, ModelRecord], whole: bytes
) -> None:
    target = MemoryStore()
    found = import_model(io.BytesIO(whole), "m.car", target)
    assert found.record == published[1] and found.model.name == "tiny"
    assert target.blocks == published[0].blocks


def test_a_model_without_signature_is_imported_and_has_no_record(published: tuple[MemoryStore, ModelRecord]) -> None:
    out, target = io.BytesIO(), MemoryStore()
    export_model(published[0], published[1].manifest, None, out)
    out.seek(0)
    assert import_model(out, "m.car", target).record is None
    assert verify(target, load_manifest(target, published[1].manifest)) == []


def test_a_file_cut_between_two_blocks_is_no_whole_model_and_a_second_import_goes_on(
    published: tuple[MemoryStore, ModelRecord], whole: bytes
) -> None:
    roots, blocks = read_car(io.BytesIO(whole), "m.car")
    out, target = io.BytesIO(), MemoryStore()
    write_car(out, roots, list(blocks)[:-3])
    out.seek(0)
    with pytest.raises(FormatError, match=r"m\.car holds no whole model .* is not in memory"):
        import_model(out, "m.car", target)
    assert import_model(io.BytesIO(whole), "m.car", target).record == published[1]


def test_a_model_of_which_a_block_is_missing_is_not_exported(published: tuple[MemoryStore, ModelRecord]) -> None:
    store = MemoryStore()
    store.blocks = dict(published[0].blocks)
    store.delete(max(store.blocks, key=lambda cid: len(store.blocks[cid])))
    with pytest.raises(NotFoundError):
        export_model(store, published[1].manifest, None, io.BytesIO())


def test_a_root_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    """A file of somebody's photographs, say."""
    out, target = io.BytesIO(), MemoryStore()
    cid = Cid.of(Codec.RAW, b"photo")
    write_car(out, [cid], [(cid, b"photo")])
    out.seek(0)
    with pytest.raises(FormatError, match="no whole model"):
        import_model(out, "photos.car", target)
