"""The laws of BlockStore, over every implementation.

Run from outside: give the fixtures `store` and `damage` and import the rest; see tests/contracts/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, InputError, NotFoundError
from shard_tools.store.block_store import MAX_BLOCK_BYTES, BlockStore
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from shard_tools.store.tiered import TieredStore

Damage = Callable[[Cid, bytes], None]


@pytest.fixture(params=["memory", "directory", "tiered"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlockStore:
    """An empty store."""
    if request.param == "memory":
        return MemoryStore()
    near = DirectoryStore(tmp_path)
    return near if request.param == "directory" else TieredStore(near, tmp_path / "lock", lambda _: (MemoryStore(),))


@pytest.fixture
def damage(store: BlockStore, tmp_path: Path) -> Damage:
    """Puts other bytes where the store keeps a block, behind its back."""

    def damaged(cid: Cid, block: bytes) -> None:
        if isinstance(store, MemoryStore):
            store.blocks[cid] = block
        else:
            next(tmp_path.rglob(str(cid))).write_bytes(block)

    return damaged


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(block=st.binary(min_size=1, max_size=200), data=st.data())
def test_altered_or_truncated_bytes_are_refused_by_name(
    store: BlockStore, damage: Damage, block: bytes, data: st.DataObject
) -> None:
    cid = store.put(Codec.RAW, block)
    at = data.draw(st.integers(0, len(block) - 1))
    flipped = block[:at] + bytes([block[at] ^ data.draw(st.integers(1, 255))]) + block[at + 1 :]
    for bad in (flipped, block[:at]):
        damage(cid, bad)
        with pytest.raises(CorruptBlockError, match=str(cid)):
            store.get(cid)
    store.delete(cid)
