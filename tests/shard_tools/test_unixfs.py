"""UnixFS trees: the official vectors of unixfs-v1-2025, the round trip, and refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from shard_tools import unixfs
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, LlmdError
from shard_tools.store.memory import MemoryStore

MIB = 1 << 20


def stream(seed: str, size: int) -> Iterator[bytes]:
    """The pieces, 1 MiB each, of the ChaCha20 stream that Kubo's test/cli/cid_profiles_test.go hashes."""
    key = hashlib.sha256(seed.encode()).digest()
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    for start in range(0, size, MIB):
        yield cipher.update(bytes(min(MIB, size - start)))


@pytest.mark.parametrize(
    ("data", "cid"),
    [
        (b"hello world", "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"),
        (b"".join(stream("chunk-v1-seed", MIB)), "bafkreiacndfy443ter6qr2tmbbdhadvxxheowwf75s6zehscklu6ezxmta"),
        (b"".join(stream("chunk-v1-seed", MIB + 1)), "bafybeigmix7t42i6jacydtquhet7srwvgpizfg7gjbq7627d35mjomtu64"),
    ],
    ids=["hello", "1MiB", "1MiB+1"],
)
def test_files_have_the_cid_that_ipfs_add_gives(data: bytes, cid: str) -> None:
    store = MemoryStore()
    root = unixfs.put_file(data, store.put)
    assert str(root) == cid
    assert unixfs.read_file(root, len(data), store.get) == data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "cid"),
    [
        (1024 * MIB, "bafybeihmf37wcuvtx4hpu7he5zl5qaf2ineo2lqlfrapokkm5zzw7zyhvm"),
        (1024 * MIB + 1, "bafybeibdsi225ugbkmpbdohnxioyab6jsqrmkts3twhpvfnzp77xtzpyhe"),
    ],
)
def test_trees_of_two_levels_have_the_cid_that_ipfs_add_gives(size: int, cid: str) -> None:
    leaves = [(Cid.of(Codec.RAW, piece), len(piece)) for piece in stream("v1-2025-seed", size)]
    assert str(unixfs.tree_root(leaves)) == cid


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=2100), st.data())
def test_leaves_of_any_sizes_read_back_as_one_file(pieces: list[bytes], data: st.DataObject) -> None:
    store = MemoryStore()
    root = unixfs.put_tree([(store.put(Codec.RAW, piece), len(piece)) for piece in pieces], store.put)
    size = sum(map(len, pieces))
    assert unixfs.read_file(root, size, store.get) == b"".join(pieces)
    assert sum(n for _, n in unixfs.tree_nodes(root, size, store.get) if n is not None) == size
    with pytest.raises(FormatError):
        unixfs.read_file(root, size + data.draw(st.sampled_from([-1, 1])), store.get)


def test_an_empty_file_is_one_empty_leaf() -> None:
    store = MemoryStore()
    root = unixfs.put_file(b"", store.put)
    assert root == Cid.of(Codec.RAW, b"") and unixfs.read_file(root, 0, store.get) == b""


@given(st.data())
def test_a_node_is_canonical_or_refused(data: st.DataObject) -> None:
    """Law: node_links(b) either raises or says what writes b again, whatever byte of it was changed."""
    blocks: list[bytes] = []

    def keep(codec: Codec, block: bytes) -> Cid:
        blocks.append(block)
        return Cid.of(codec, block)

    unixfs.put_tree([(Cid.of(Codec.RAW, bytes([i])), i + 1) for i in range(3)], keep)
    node = bytearray(blocks[-1])
    at = data.draw(st.integers(0, len(node) - 1))
    node[at] ^= data.draw(st.integers(1, 255))
    try:
        links = unixfs.node_links(bytes(node))
    except LlmdError:
        return
    assert unixfs._node(links) == bytes(node)


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        unixfs.node_links(garbage)


def test_a_tree_that_nests_without_end_is_cut_off() -> None:
    store = MemoryStore()
    cid, stored = store.put(Codec.RAW, b"x"), 1
    for _ in range(10):
        node = unixfs._node([unixfs.Link(cid, 1, stored)])
        cid, stored = store.put(Codec.DAG_PB, node), stored + len(node)
    with pytest.raises(FormatError, match="nests deeper"):
        unixfs.read_file(cid, 1, store.get)
