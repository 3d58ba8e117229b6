"""The exact bytes that cross a stage boundary, bound by one hash.

A *row* is what one token position sends across a boundary: its token id, or its hidden state. Sender and
receiver each hash their own copy; equal roots mean equal bytes at every position. A leaf says which model,
layer, dtype, width and position its bytes belong to, and no request: two requests that share a prefix share
its hashes. The tree is the Merkle tree of RFC 9162 section 2.1.1, whose 0x00 and 0x01 prefixes keep a leaf
from passing as an inner node, and which never repeats an odd one.

Laws: `RowTree.root()` depends on the rows alone, not on how they were cut into appends;
`tree_root(leaves) == tree_root([tree_root(page) for page in pages of PAGE_ROWS leaves])`, the last page
possibly short: pages whose roots are known need not be hashed again.
Bytes: PROTOCOL.md. Knows nothing of requests, signatures, numpy or torch: rows come as bytes. A process that serves
has rows_native.py compute the same hashes faster.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.receipts import rows_native
from shard_tools.cid import Cid, Codec

RowDtype = Literal["ids", "float32", "bfloat16", "float16"]

_REMEMBERED_IDS = 4096
PAGE_ROWS = 16  # a power of two, or the law of pages would not hold

_TAG = b"llmd.row.v1\0\0\0"  # 14 bytes: they make the header one 64-byte block of SHA-256
_HEADER = struct.Struct("<c14s32sIBI")  # leaf prefix, tag, manifest digest, layer, dtype code, width
_POSITION = struct.Struct("<Q")
_CODES: dict[RowDtype, int] = {"ids": 0, "float32": 1, "bfloat16": 2, "float16": 3}
_SIZES: dict[RowDtype, int] = {"ids": 4, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where rows cross: into decoder layer `layer` of a model; layer n_layers is the final norm and head.

    Token ids enter layer 0 with dtype "ids" and width 1, each a little-endian uint32. Hidden rows are
    `width` little-endian values. So the out-boundary of stage [a, b) is the in-boundary of the next.
    """

    manifest: Cid
    layer: int
    dtype: RowDtype
    width: int

    def __post_init__(self) -> None:
        assert self.manifest.codec is Codec.DAG_CBOR, "a boundary is of a manifest"
        assert 0 <= self.layer < 1 << 32 and 1 <= self.width < 1 << 32
        assert self.dtype != "ids" or (self.layer == 0 and self.width == 1)

    @property
    def row_bytes(self) -> int:
        """Size of one row, bytes."""
        return self.width * _SIZES[self.dtype]

    @property
    def leaf_prefix(self) -> bytes:
        """56 bytes: a row's leaf is the SHA-256 of these, its position as a little-endian u64, and its own bytes."""
        return _HEADER.pack(b"\0", _TAG, self.manifest.digest, self.layer, _CODES[self.dtype], self.width)


class RowTree:
    """Hashes rows as they come and keeps one root per full subtree: O(log n) memory, whatever the length."""

    def __init__(self, boundary: Boundary, first_position: int = 0) -> None:
        self.boundary = boundary
        self._row_bytes = boundary.row_bytes
        self._next = first_position
        self._count = 0
        self._roots: list[bytes] = []  # of the full subtrees that tile the rows so far, largest first

    def __len__(self) -> int:
        """Rows hashed so far."""
        return self._count

    def append(self, first_position: int, rows: bytes | memoryview) -> None:
        """Hash further rows, whole and in order; first_position is that of the first of them.

        A memoryview must be contiguous and of bytes. It is read before this returns, and not kept.
        """
        size, view = self._row_bytes, memoryview(rows)
        n_rows, rest = divmod(len(view), size)
        assert view.itemsize == 1 and rest == 0, f"{len(view)} bytes are no whole number of rows of {size}"
        assert first_position == self._next, f"rows of position {first_position} where {self._next} comes next"
        hashed = leaves_of(self.boundary, [(first_position, n_rows)], view)
        self._grow([hashed[i : i + 32] for i in range(0, 32 * n_rows, 32)])

    def append_leaves(self, first_position: int, leaves: bytes | memoryview) -> None:
        """As append, where the leaves of the rows (32 bytes each) were made elsewhere by the rule of leaf_prefix."""
        n_rows, rest = divmod(len(leaves), 32)
        assert rest == 0, f"{len(leaves)} bytes are no whole number of leaves"
        assert first_position == self._next, f"rows of position {first_position} where {self._next} comes next"
        view = bytes(leaves)
        self._grow([view[i : i + 32] for i in range(0, 32 * n_rows, 32)])

    def append_page(self, first_position: int, root: bytes) -> None:
        """As append, for PAGE_ROWS rows whose page_root is known. The rows so far must be whole pages too."""
        assert first_position == self._next, f"rows of position {first_position} where {self._next} comes next"
        assert self._count % PAGE_ROWS == 0, f"a page behind {self._count} rows"
        node, filled = root, self._count // PAGE_ROWS
        while filled & 1:
            node = hashlib.sha256(b"\1" + self._roots.pop() + node).digest()
            filled >>= 1
        self._roots.append(node)
        self._count += PAGE_ROWS
        self._next += PAGE_ROWS

    def root_behind(self, page: bytes | None, leaves: bytes) -> bytes:
        """As `root`, if a page of this root followed (None: none), then these leaves, fewer than a page has.

        The rows so far must be whole pages. Nothing is kept.
        """
        assert self._count % PAGE_ROWS == 0 and len(leaves) < 32 * PAGE_ROWS, "a part of a page behind a part of one"
        roots, filled = list(self._roots), self._count // PAGE_ROWS
        if page is not None:
            while filled & 1:
                page = hashlib.sha256(b"\1" + roots.pop() + page).digest()
                filled >>= 1
            roots.append(page)
        if leaves:
            roots.append(tree_root([leaves[i : i + 32] for i in range(0, len(leaves), 32)]))
        return _fold(roots)

    def _grow(self, leaves: list[bytes]) -> None:
        sha256, roots, count = hashlib.sha256, self._roots, self._count
        for node in leaves:
            filled = count
            while filled & 1:  # two subtrees of equal size become one
                node = sha256(b"\1" + roots.pop() + node).digest()
                filled >>= 1
            roots.append(node)
            count += 1
        self._count = count
        self._next += len(leaves)

    def root(self) -> bytes:
        """32 bytes: the root over all rows so far; the tree goes on growing."""
        return _fold(self._roots)


def leaves_of(boundary: Boundary, spans: Iterable[tuple[int, int]], rows: bytes | memoryview) -> bytes:
    """32 bytes a row. spans: (first position, rows) of each run of rows, which lie one after another."""
    if rows_native.is_ready():
        runs = list(spans)
        assert boundary.row_bytes * sum(count for _, count in runs) == len(rows), "rows and spans differ"
        return rows_native.leaves(boundary.leaf_prefix, runs, rows, boundary.row_bytes)
    # One hash per row, a few hundred nanoseconds of Python each: names are bound outside the loop.
    sha256, prefix, position, size = hashlib.sha256, boundary.leaf_prefix, _POSITION.pack, boundary.row_bytes
    view, at, out = memoryview(rows), 0, []
    for first, count in spans:
        if size <= 64:  # one call costs half of one that a second continues: half the price of a token id
            for i in range(count):
                out.append(sha256(prefix + position(first + i) + view[at : at + size]).digest())
                at += size
        else:
            for i in range(count):
                hasher = sha256(prefix + position(first + i))
                hasher.update(view[at : at + size])
                out.append(hasher.digest())
                at += size
    assert at == len(view), f"{len(view)} bytes where the spans have {at}"
    return b"".join(out)


def page_roots(leaves: bytes) -> list[bytes]:
    """32 bytes a page: the roots over the PAGE_ROWS leaves of each of some whole pages, 32 bytes a leaf."""
    pages, rest = divmod(len(leaves), 32 * PAGE_ROWS)
    assert rest == 0, f"{len(leaves)} bytes are no whole number of pages of leaves"
    if rows_native.is_ready():
        leaves = rows_native.page_roots(leaves, pages)
    else:
        sha256 = hashlib.sha256
        while len(leaves) > 32 * pages:
            leaves = b"".join([sha256(b"\1" + leaves[i : i + 64]).digest() for i in range(0, len(leaves), 64)])
    return [leaves[i : i + 32] for i in range(0, 32 * pages, 32)]


def tree_root(hashes: Sequence[bytes]) -> bytes:
    """The RFC 9162 root over hashes of leaves, or of pages (see the law above)."""
    roots: list[bytes] = []
    for count, hashed in enumerate(hashes):
        node, filled = hashed, count
        while filled & 1:
            node = hashlib.sha256(b"\1" + roots.pop() + node).digest()
            filled >>= 1
        roots.append(node)
    return _fold(roots)


def ids_boundary(manifest: Cid) -> Boundary:
    """Where the token ids of a request enter this model."""
    return Boundary(manifest, 0, "ids", 1)


def ids_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as rows: little-endian uint32 each."""
    return struct.pack(f"<{len(ids)}I", *ids)


def ids_root(manifest: Cid, ids: Sequence[int], first_position: int = 0) -> bytes:
    """32 bytes: the root over token ids that stand at first_position and after."""
    if len(ids) <= _REMEMBERED_IDS:
        return _remembered_root(manifest, tuple(ids), first_position)
    return _ids_root(manifest, ids, first_position)


@functools.lru_cache(maxsize=512)
def _remembered_root(manifest: Cid, ids: tuple[int, ...], first_position: int) -> bytes:
    # A request's prompt and answer are each asked for three times between its submission and its receipt.
    return _ids_root(manifest, ids, first_position)


def _ids_root(manifest: Cid, ids: Sequence[int], first_position: int) -> bytes:
    boundary = ids_boundary(manifest)
    if rows_native.is_ready() and ids:
        return rows_native.rows_root(boundary.leaf_prefix, first_position, ids_bytes(ids), boundary.row_bytes)
    tree = RowTree(boundary, first_position)
    tree.append(first_position, ids_bytes(ids))
    return tree.root()


def _fold(roots: Sequence[bytes]) -> bytes:
    if not roots:
        return hashlib.sha256(b"").digest()  # RFC 9162: the root of the empty tree
    node = roots[-1]
    for left in reversed(roots[:-1]):
        node = hashlib.sha256(b"\1" + left + node).digest()
    return node
