"""The laws of BlockStore, over every implementation."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, InputError, NotFoundError
from shard_tools.store.block_store import MAX_BLOCK_BYTES, BlockStore
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlockStore:
    return MemoryStore() if request.param == "memory" else DirectoryStore(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(codec=st.sampled_from(Codec), block=st.binary(max_size=300))
def test_what_was_put_is_got_under_the_name_its_bytes_have(store: BlockStore, codec: Codec, block: bytes) -> None:
    cid = store.put(codec, block)
    assert cid == Cid.of(codec, block) == store.put(codec, block)
    assert store.get(cid) == block
    assert store.has(cid) and cid in set(store.cids())


def test_a_block_that_is_not_there_is_said_to_be_missing(store: BlockStore) -> None:
    cid = Cid.of(Codec.RAW, b"nowhere")
    assert not store.has(cid)
    with pytest.raises(NotFoundError, match=str(cid)):
        store.get(cid)
    store.delete(cid)


def test_a_deleted_block_is_gone(store: BlockStore) -> None:
    cid = store.put(Codec.RAW, b"x")
    store.delete(cid)
    assert not store.has(cid) and list(store.cids()) == []


def test_equal_bytes_of_two_codecs_are_two_blocks(store: BlockStore) -> None:
    a, b = store.put(Codec.RAW, b"x"), store.put(Codec.DAG_PB, b"x")
    store.delete(a)
    assert store.get(b) == b"x"


def test_a_block_too_large_to_travel_is_refused(store: BlockStore) -> None:
    store.put(Codec.RAW, bytes(MAX_BLOCK_BYTES))
    with pytest.raises(InputError, match="at most"):
        store.put(Codec.RAW, bytes(MAX_BLOCK_BYTES + 1))


def _damage(store: BlockStore, cid: Cid, block: bytes) -> None:
    if isinstance(store, MemoryStore):
        store.blocks[cid] = block
    else:
        assert isinstance(store, DirectoryStore)
        path = next(Path(store.label.removeprefix("directory ")).rglob(str(cid)))
        path.write_bytes(block)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(block=st.binary(min_size=1, max_size=200), data=st.data())
def test_altered_or_truncated_bytes_are_refused_by_name(store: BlockStore, block: bytes, data: st.DataObject) -> None:
    cid = store.put(Codec.RAW, block)
    at = data.draw(st.integers(0, len(block) - 1))
    flipped = block[:at] + bytes([block[at] ^ data.draw(st.integers(1, 255))]) + block[at + 1 :]
    for bad in (flipped, block[:at]):
        _damage(store, cid, bad)
        with pytest.raises(CorruptBlockError, match=str(cid)):
            store.get(cid)
    store.delete(cid)


def test_a_torn_block_is_healed_by_putting_it_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    cid = store.put(Codec.RAW, b"whole")
    _damage(store, cid, b"who")
    assert store.put(Codec.RAW, b"whole") == cid
    assert store.get(cid) == b"whole"


def _write_forever(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    store = DirectoryStore(root)
    for i in range(1 << 30):
        store.put(Codec.RAW, os.urandom(8) * 50_000)
        if i == 20:
            ready.set()


def test_a_writer_killed_at_any_moment_leaves_whole_blocks_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=_write_forever, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(30) and writer.pid
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    store = DirectoryStore(tmp_path)
    held = list(store.cids())
    assert len(held) > 20
    for cid in held:
        assert len(store.get(cid)) == 400_000


def test_blocks_of_a_directory_are_readable_by_others(tmp_path: Path) -> None:
    cid = DirectoryStore(tmp_path).put(Codec.RAW, b"x")
    assert next(tmp_path.rglob(str(cid))).stat().st_mode & 0o777 == 0o644


def test_abandoned_temporary_files_are_forgotten_and_fresh_ones_kept(tmp_path: Path) -> None:
    DirectoryStore(tmp_path)
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    DirectoryStore(tmp_path)
    assert not old.exists() and new.exists()
