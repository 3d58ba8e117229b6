"""Files as blocks that any IPFS node can store, cat and range-read: dag-pb nodes over raw leaves.

Two cuts of a file into leaves share one tree. Ordinary files take the profile `unixfs-v1-2025` (1 MiB leaves,
1024 links a node, balanced) and so have the CID that `ipfs add` with that profile gives. Shards are cut where
their tensors start, which UnixFS allows, so that a changed tensor changes its own leaves only.

Law: the root depends on nothing but the leaves. Every byte form read here must be the one written here.
Knows nothing of stores: who builds a tree says where its blocks go, who reads one says where they come from.
Sources: https://github.com/ipfs/specs/blob/main/UNIXFS.md, IPIP-0499.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError

LEAF_BYTES = 1 << 20  # unixfs-v1-2025; and the fastest of those measured: FORMATS.md
WIDTH = 1024  # links of a node, unixfs-v1-2025
MAX_DEPTH = 4  # 1024^4 leaves: more than any file; stops a tree made to be endless

_FILE = b"\x08\x02"  # UnixFS Data.Type = File
_CID_BYTES = 36

PutBlock = Callable[[Codec, bytes], Cid]
GetBlock = Callable[[Cid], bytes]


@dataclass(frozen=True, slots=True)
class Link:
    """A child of a node. size: bytes of the file below it; stored: bytes of all blocks below it, it included."""

    cid: Cid
    size: int
    stored: int


def leaf_sizes(size: int) -> Iterator[int]:
    """The sizes of the leaves of `size` bytes that start a cut: all full but the last."""
    for start in range(0, size, LEAF_BYTES):
        yield min(LEAF_BYTES, size - start)


def put_file(data: bytes | memoryview, put: PutBlock) -> Cid:
    """Every block of an ordinary file is put; returns its root, which is what `ipfs add` would say."""
    view = memoryview(data)
    leaves = []
    for start in range(0, max(len(view), 1), LEAF_BYTES):
        leaf = bytes(view[start : start + LEAF_BYTES])
        leaves.append((put(Codec.RAW, leaf), len(leaf)))
    return put_tree(leaves, put)


def put_tree(leaves: Sequence[tuple[Cid, int]], put: PutBlock) -> Cid:
    """The inner nodes over leaves (cid, size), in order, are put; returns the root: the leaf itself if it is alone."""
    assert leaves, "a file has at least one leaf, be it empty"
    level = [Link(cid, size, size) for cid, size in leaves]
    while len(level) > 1:
        level = [_put_node(level[i : i + WIDTH], put) for i in range(0, len(level), WIDTH)]
    return level[0].cid


def tree_root(leaves: Sequence[tuple[Cid, int]]) -> Cid:
    """The root that `put_tree` would return; nothing is kept."""
    return put_tree(leaves, Cid.of)


def read_file(cid: Cid, size: int, get: GetBlock) -> bytes:
    """The `size` bytes of the file. get must return verified blocks.

    Reads no more than the file's own tree: raises FormatError as soon as a node says more, or other, than `size`.
    """
    parts = list(_read(cid, size, get, 0))
    return b"".join(parts)


def tree_nodes(cid: Cid, size: int, get: GetBlock) -> Iterator[tuple[Cid, int | None]]:
    """Every block of a file, root first: (cid, size of the leaf), or (cid, None) for a node. Leaves are not read."""
    yield from _walk(cid, size, get, 0)


def node_links(block: bytes) -> tuple[Link, ...]:
    """The children of a dag-pb file node. Raises FormatError unless these are the bytes we would write for them."""
    reader = _Bytes(block)
    cids, stored = [], []
    while not reader.done and reader.peek() == 0x12:
        link = _Bytes(reader.field(0x12))
        cids.append(Cid.from_bytes(link.field(0x0A)))
        if link.field(0x12):
            raise FormatError("a UnixFS file node has a named link")
        stored.append(link.number(0x18))
        link.end()
    data = _Bytes(reader.field(0x0A))
    reader.end()
    if data.take(2) != _FILE:
        raise FormatError("a dag-pb node is not a UnixFS file")
    data.number(0x18)
    sizes = []
    while not data.done:
        sizes.append(data.number(0x20))
    if not cids or len(cids) > WIDTH or len(sizes) != len(cids):
        raise FormatError(f"a UnixFS file node has {len(cids)} links and {len(sizes)} sizes (at most {WIDTH} of each)")
    links = tuple(Link(*item) for item in zip(cids, sizes, stored, strict=True))
    if _node(links) != block:
        raise FormatError("a UnixFS file node is not in canonical form")
    return links


def _walk(cid: Cid, size: int, get: GetBlock, depth: int) -> Iterator[tuple[Cid, int | None]]:
    if cid.codec is Codec.RAW:
        yield cid, size
        return
    yield cid, None
    for link in _children(cid, size, get, depth):
        yield from _walk(link.cid, link.size, get, depth + 1)


def _read(cid: Cid, size: int, get: GetBlock, depth: int) -> Iterator[bytes]:
    if cid.codec is Codec.RAW:
        leaf = get(cid)
        if len(leaf) != size:
            raise FormatError(f"leaf {cid} has {len(leaf)} bytes where its file says {size}")
        yield leaf
        return
    for link in _children(cid, size, get, depth):
        yield from _read(link.cid, link.size, get, depth + 1)


def _children(cid: Cid, size: int, get: GetBlock, depth: int) -> tuple[Link, ...]:
    if cid.codec is not Codec.DAG_PB or depth >= MAX_DEPTH:
        raise FormatError(f"{cid} is no part of a UnixFS file, or nests deeper than {MAX_DEPTH}")
    links = node_links(get(cid))
    below = sum(link.size for link in links)
    if below != size or not all(link.size for link in links):
        raise FormatError(f"file node {cid} holds {below} bytes where {size} were expected, or an empty child")
    return links


def _put_node(links: Sequence[Link], put: PutBlock) -> Link:
    block = _node(links)
    return Link(put(Codec.DAG_PB, block), sum(x.size for x in links), len(block) + sum(x.stored for x in links))


def _node(links: Sequence[Link]) -> bytes:
    out = bytearray()
    for link in links:
        body = b"\x0a" + _varint(_CID_BYTES) + bytes(link.cid) + b"\x12\x00\x18" + _varint(link.stored)
        out += b"\x12" + _varint(len(body)) + body
    data = _FILE + b"\x18" + _varint(sum(link.size for link in links))
    data += b"".join(b"\x20" + _varint(link.size) for link in links)
    return bytes(out + b"\x0a" + _varint(len(data)) + data)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Bytes:
    """Reads protobuf fields in the one order we write; anything else raises FormatError."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def peek(self) -> int:
        return self._data[self._at]

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise FormatError("a dag-pb node is cut short")
        self._at += size
        return part

    def number(self, tag: int) -> int:
        self._expect(tag)
        return self._varint()

    def field(self, tag: int) -> bytes:
        self._expect(tag)
        return self.take(self._varint())

    def end(self) -> None:
        if not self.done:
            raise FormatError("a dag-pb node has unknown fields")

    def _expect(self, tag: int) -> None:
        if self.take(1)[0] != tag:
            raise FormatError("a dag-pb node is not a UnixFS file in canonical form")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise FormatError("a dag-pb node has a number beyond 63 bits")
