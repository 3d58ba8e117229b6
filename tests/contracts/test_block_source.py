"""The laws of BlockSource, over every implementation that gives blocks and keeps none.

Run from outside: give the fixtures `origin`, `source` and `damage` and import the rest; see tests/contracts/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.block_server import BlockServer
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, NotFoundError
from shard_tools.http_client import Patience
from shard_tools.store.block_store import MAX_BLOCK_BYTES, BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.gateway import Gateway
from shard_tools.store.http_source import HttpSource

SECRET = bytes(range(32))
Damage = Callable[[Cid, bytes], None]


@pytest.fixture
def origin(tmp_path: Path) -> DirectoryStore:
    """Where the blocks lie that the source gives; empty."""
    return DirectoryStore(tmp_path)


@pytest.fixture(params=["gateway", "peer"])
def source(request: pytest.FixtureRequest, origin: DirectoryStore) -> Iterator[BlockSource]:
    """What gives the blocks of origin."""
    secret = SECRET if request.param == "peer" else None
    server = BlockServer(origin, "127.0.0.1", 0, secret)
    url = f"http://127.0.0.1:{server.port}"
    source = HttpSource(url, "peer", Patience(), secret) if secret else Gateway(url, Patience())
    yield source
    source.close()
    server.close()


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    """Puts other bytes where origin keeps a block, behind its back."""

    def damaged(cid: Cid, block: bytes) -> None:
        next(tmp_path.rglob(str(cid))).write_bytes(block)

    return damaged


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(codec=st.sampled_from(Codec), block=st.binary(max_size=300))
def test_what_the_origin_holds_is_got(origin: DirectoryStore, source: BlockSource, codec: Codec, block: bytes) -> None:
    cid = origin.put(codec, block)
    assert source.has(cid) and source.get(cid) == block


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, MAX_BLOCK_BYTES])
def test_blocks_of_every_size_are_got_whole(origin: DirectoryStore, source: BlockSource, size: int) -> None:
    block = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    cid = origin.put(Codec.RAW, block[:size])
    assert source.get(cid) == block[:size]


def test_a_block_that_is_not_there_is_said_to_be_missing(source: BlockSource) -> None:
    cid = Cid.of(Codec.RAW, b"nowhere")
    assert not source.has(cid)
    with pytest.raises(NotFoundError, match=str(cid)):
        source.get(cid)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(block=st.binary(min_size=1, max_size=200), data=st.data())
def test_altered_or_truncated_bytes_are_refused_by_name(
    origin: DirectoryStore, source: BlockSource, damage: Damage, block: bytes, data: st.DataObject
) -> None:
    """And the next block is got all the same."""
    cid, good = origin.put(Codec.RAW, block), origin.put(Codec.DAG_PB, b"good")
    at = data.draw(st.integers(0, len(block) - 1))
    flipped = block[:at] + bytes([block[at] ^ data.draw(st.integers(1, 255))]) + block[at + 1 :]
    for bad in (flipped, block[:at], block + b"x"):
        damage(cid, bad)
        with pytest.raises(CorruptBlockError, match=str(cid)):
            source.get(cid)
        assert source.get(good) == b"good"
    origin.delete(cid)
