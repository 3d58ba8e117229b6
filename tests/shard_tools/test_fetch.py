"""Publishing, opening, fetching and verifying, with honest and with lying stores."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.catalog import open_cid, open_model, open_record
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, FormatError, LlmdError, ManifestError, NotFoundError, SignatureError
from shard_tools.fetch import fetch, load_manifest, model_blocks, read_tensor, verify
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.memory import MemoryIndex
from shard_tools.index.model_index import ModelRecord
from shard_tools.manifest import Manifest
from shard_tools.naming import sign_and_name
from shard_tools.publish import publish
from shard_tools.release import Release, SignedRelease
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from shard_tools.trust import TrustPolicy
from tests.tiny_models import write_tiny_checkpoint

NOW = int(time.time())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("ck"), layers=3, tied=True)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.load_or_create(tmp_path_factory.mktemp("k") / "key.pem")


@pytest.fixture(scope="module")
def published(folder: Path, signer: Signer) -> tuple[MemoryStore, ModelRecord, Manifest]:
    store = MemoryStore()
    record = publish(folder, store, MemoryIndex(), "tiny", signer)
    return store, record, load_manifest(store, record.manifest)


def copy_of(store: MemoryStore) -> MemoryStore:
    copy = MemoryStore()
    copy.blocks = dict(store.blocks)
    return copy


def keys(*signers: Signer) -> TrustPolicy:
    return TrustPolicy.any_of(signer.public for signer in signers)


def test_the_same_checkpoint_has_the_same_cid_whoever_publishes_it_wherever(folder: Path, tmp_path: Path) -> None:
    records = []
    for place in ("a", "b"):
        root = tmp_path / place
        signer = Signer.load_or_create(root / "key.pem")
        copy = write_tiny_checkpoint(root / "ck", layers=3, tied=True)
        records.append(publish(copy, DirectoryStore(root), DirectoryIndex(root), "tiny", signer))
    assert records[0].manifest == records[1].manifest
    assert records[0].signature != records[1].signature


def test_a_published_model_opens_by_name_for_those_who_trust_its_publisher(folder: Path, signer: Signer) -> None:
    store, index = MemoryStore(), MemoryIndex()
    record = publish(folder, store, index, "tiny", signer)
    found = open_model("tiny", index, store, keys(signer), NOW, None)
    assert found.cid == record.manifest == open_cid(record.manifest, store).cid


def test_an_unknown_publisher_is_refused(published: tuple[MemoryStore, ModelRecord, Manifest], tmp_path: Path) -> None:
    store, record, _ = published
    stranger = Signer.load_or_create(tmp_path / "other.pem")
    for trusted in (keys(stranger), keys()):
        with pytest.raises(SignatureError, match="not by a trusted publisher"):
            open_record(record, store, trusted)


def test_a_signature_over_another_manifest_is_refused(
    published: tuple[MemoryStore, ModelRecord, Manifest], signer: Signer
) -> None:
    store, record = copy_of(published[0]), published[1]
    other = store.put(
        Codec.DAG_CBOR, SignedRelease.sign(Release("tiny", 1, NOW, Cid.of(Codec.DAG_CBOR, b"another")), signer).encode()
    )
    with pytest.raises(SignatureError, match="not the one it came with"):
        open_record(ModelRecord(record.manifest, other), store, keys(signer))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_a_signature_with_one_changed_byte_is_refused(
    published: tuple[MemoryStore, ModelRecord, Manifest], signer: Signer, data: st.DataObject
) -> None:
    store, record, _ = published
    block = bytearray(store.get(record.signature))
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((SignatureError, FormatError)):
        SignedRelease.decode(bytes(block)).check(keys(signer))


def test_a_name_that_points_at_another_signed_model_is_refused(
    published: tuple[MemoryStore, ModelRecord, Manifest], signer: Signer
) -> None:
    store, record, _ = published
    index = MemoryIndex()
    index.publish("other", record, store.has)
    with pytest.raises(FormatError, match="re-pointed"):
        open_model("other", index, store, keys(signer), NOW, None)


class Interrupted:
    """A store that is stopped after `left` puts, as Ctrl-C would stop it."""

    def __init__(self, inner: MemoryStore, left: int) -> None:
        self.inner, self.left = inner, left
        self.label, self.get, self.has, self.delete, self.cids = (
            inner.label,
            inner.get,
            inner.has,
            inner.delete,
            inner.cids,
        )

    def put(self, codec: Codec, block: bytes) -> Cid:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.inner.put(codec, block)


@pytest.mark.parametrize("puts", [0, 1, 7, 20, 40])
def test_an_interrupted_publish_names_nothing_and_goes_on(folder: Path, signer: Signer, puts: int) -> None:
    inner, index = MemoryStore(), MemoryIndex()
    with pytest.raises(KeyboardInterrupt):
        publish(folder, Interrupted(inner, puts), index, "tiny", signer)
    assert index.names() == ()
    kept = dict(inner.blocks)
    record = publish(folder, inner, index, "tiny", signer)
    assert verify(inner, open_cid(record.manifest, inner)) == []
    assert kept.items() <= inner.blocks.items()


@pytest.mark.parametrize("puts", [0, 1, 7, 20, 40])
def test_an_interrupted_fetch_goes_on_without_asking_again(
    published: tuple[MemoryStore, ModelRecord, Manifest], puts: int
) -> None:
    source, record, manifest = published
    target = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        fetch(source, Interrupted(target, puts), record.manifest, threads=2)
    assert not target.has(record.manifest)
    counting = Counting(source)
    assert fetch(counting, target, record.manifest) == manifest
    assert verify(target, manifest) == []
    leaves = {leaf.cid for shard in manifest.shards for t in shard.tensors for leaf in t.leaves}
    assert len([cid for cid in counting.asked if cid in leaves]) <= max(0, len(leaves) - max(0, puts - 5))


class Counting(MemoryStore):
    """A store that remembers what it was asked for."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__()
        self.blocks, self.asked = inner.blocks, list[Cid]()

    def get(self, cid: Cid) -> bytes:
        self.asked.append(cid)
        return super().get(cid)


def test_a_fetched_model_is_whole_and_holds_nothing_else(
    published: tuple[MemoryStore, ModelRecord, Manifest], tmp_path: Path
) -> None:
    source, record, manifest = published
    target = DirectoryStore(tmp_path)
    seen: list[tuple[int, int]] = []
    fetch(source, target, record.manifest, progress=lambda label, done, total: seen.append((done, total)))
    assert set(target.cids()) == set(model_blocks(manifest, source.get)) == set(source.cids()) - {record.signature}
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(
        t.size for s in manifest.shards for t in s.tensors
    ) + sum(f.size for f in manifest.files)


def test_a_stage_fetches_its_own_units_only(published: tuple[MemoryStore, ModelRecord, Manifest]) -> None:
    source, record, manifest = published
    target = MemoryStore()
    fetch(source, target, record.manifest, layers=(1, 2))
    held = {t.name for s in manifest.shards for t in s.tensors if all(target.has(leaf.cid) for leaf in t.leaves)}
    assert held == {ref.name for ref in manifest.units[2].tensors}
    fetch(source, target, record.manifest, layers=(2, 3))
    tied = manifest.tensor(manifest.units[-1].tensors[0])
    assert tied.name == "model.embed_tokens.weight" and all(target.has(leaf.cid) for leaf in tied.leaves)
    assert load_manifest(target, record.manifest) == manifest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found_and_named(
    published: tuple[MemoryStore, ModelRecord, Manifest], data: st.DataObject
) -> None:
    """In any block of a model: verify names it, fetch refuses it or never reads it, and nothing bad is copied."""
    store, record, manifest = published
    bad = copy_of(store)
    cid = data.draw(st.sampled_from(sorted(set(store.blocks) - {record.signature})))
    block = bytearray(store.blocks[cid])
    if data.draw(st.booleans()):
        block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del block[data.draw(st.integers(0, len(block) - 1)) :]
    bad.blocks[cid] = bytes(block)
    assert [item.cid for item in verify(bad, manifest)] == [cid]
    target = MemoryStore()
    try:
        fetch(bad, target, record.manifest)
    except CorruptBlockError as e:
        assert e.asked == cid
    for held in target.cids():
        assert target.get(held) == store.get(held)


def test_a_bad_block_in_the_target_is_replaced(published: tuple[MemoryStore, ModelRecord, Manifest]) -> None:
    source, record, manifest = published
    target = copy_of(source)
    leaf = manifest.shards[1].tensors[0].leaves[0]
    target.blocks[leaf.cid] = b"bad"
    fetch(source, target, record.manifest)
    assert verify(target, manifest) == []


def test_reading_a_model_at_rest_needs_no_torch() -> None:
    """Whoever checks a receipt reads manifests and files; that must not load a deep learning library."""
    code = (
        "import sys, shard_tools.catalog, shard_tools.fetch, shard_tools.cli, shard_tools.placement.even\n"
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_block_is_named(published: tuple[MemoryStore, ModelRecord, Manifest]) -> None:
    store, record, manifest = published
    partial = copy_of(store)
    tensor = manifest.shards[1].tensors[0]
    partial.delete(tensor.leaves[0].cid)
    with pytest.raises(NotFoundError, match=str(tensor.leaves[0].cid)):
        read_tensor(partial, tensor, memoryview(bytearray(tensor.size)))
    assert [(item.cid, item.where) for item in verify(partial, manifest)] == [(tensor.leaves[0].cid, "layer 0")]
    with pytest.raises(NotFoundError):
        fetch(partial, MemoryStore(), record.manifest)


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.DAG_PB])
def test_a_cid_of_another_kind_is_no_manifest(
    published: tuple[MemoryStore, ModelRecord, Manifest], codec: Codec
) -> None:
    store, _, manifest = published
    with pytest.raises(FormatError, match="no manifest"):
        load_manifest(store, Cid(codec, manifest.cid.digest))


def test_a_block_that_is_no_manifest_is_refused(
    published: tuple[MemoryStore, ModelRecord, Manifest], signer: Signer
) -> None:
    store, record, manifest = published
    for cid in (record.signature, Cid.of(Codec.DAG_CBOR, manifest.shards[0].index())):
        with pytest.raises((FormatError, ManifestError)):
            load_manifest(store, cid)


def test_a_name_is_not_given_to_a_manifest_that_is_not_there(
    published: tuple[MemoryStore, ModelRecord, Manifest], signer: Signer
) -> None:
    _, _, manifest = published
    index = MemoryIndex()
    with pytest.raises(LlmdError):
        sign_and_name(manifest, MemoryStore(), index, signer, NOW)
    assert index.names() == ()
