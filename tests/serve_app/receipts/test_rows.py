"""The row tree is RFC 9162's tree, however its rows arrive."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.receipts.rows import (
    PAGE_ROWS,
    Boundary,
    RowTree,
    ids_boundary,
    ids_bytes,
    ids_root,
    page_roots,
    tree_root,
)
from shard_tools.cid import Cid, Codec

MANIFEST = Cid.of(Codec.DAG_CBOR, b"a manifest")
BOUNDARY = Boundary(MANIFEST, 3, "bfloat16", 5)


def rfc_root(leaves: list[bytes]) -> bytes:
    """MTH as RFC 9162 section 2.1.1 defines it, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + rfc_root(leaves[:k]) + rfc_root(leaves[k:])).digest()


def leaf(boundary: Boundary, position: int, row: bytes) -> bytes:
    """One leaf, written from PROTOCOL.md and not from the code."""
    code = {"ids": 0, "float32": 1, "bfloat16": 2, "float16": 3}[boundary.dtype]
    header = b"\0" + b"llmd.row.v1\0\0\0" + boundary.manifest.digest
    header += struct.pack("<IBIQ", boundary.layer, code, boundary.width, position)
    assert len(header) == 64
    return hashlib.sha256(header + row).digest()


def rows_of(n: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % i).digest()[: BOUNDARY.row_bytes] for i in range(n)]


@given(st.lists(st.integers(0, 20), max_size=6))
def test_root_is_that_of_the_rfc_however_rows_are_cut(cuts: list[int]) -> None:
    """root() == MTH(leaves), after any sequence of appends, empty ones too."""
    rows = rows_of(sum(cuts))
    tree = RowTree(BOUNDARY)
    for take in cuts:
        tree.append(len(tree), b"".join(rows[len(tree) : len(tree) + take]))
    assert len(tree) == len(rows)
    assert tree.root() == rfc_root([leaf(BOUNDARY, i, row) for i, row in enumerate(rows)])


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100, 257])
def test_pages_can_stand_for_their_rows(n: int) -> None:
    """The tree over rows is the tree over the roots of its pages, the last one short."""
    leaves = [leaf(BOUNDARY, i, row) for i, row in enumerate(rows_of(n))]
    pages = [tree_root(leaves[i : i + PAGE_ROWS]) for i in range(0, n, PAGE_ROWS)]
    assert tree_root(pages) == tree_root(leaves) == rfc_root(leaves)


def test_every_field_of_a_boundary_changes_the_root() -> None:
    """The same bytes under another model, layer, dtype, width or position have another root."""
    row = bytes(20)
    boundaries = [
        Boundary(MANIFEST, 3, "float16", 10),
        Boundary(MANIFEST, 3, "bfloat16", 10),
        Boundary(MANIFEST, 4, "bfloat16", 10),
        Boundary(MANIFEST, 3, "float32", 5),
        Boundary(Cid.of(Codec.DAG_CBOR, b"another"), 3, "float16", 10),
    ]
    roots = []
    for boundary in boundaries:
        tree = RowTree(boundary)
        tree.append(0, memoryview(row))
        roots.append(tree.root())
    later = RowTree(boundaries[0], 1)
    later.append(1, row)
    assert len({*roots, later.root()}) == len(boundaries) + 1


def test_a_neighbour_hashes_the_same_leaf() -> None:
    """Out-boundary of stage [a, b) and in-boundary of [b, c) are one value, so their roots can be equal."""
    assert Boundary(MANIFEST, 3, "bfloat16", 5) == replace(BOUNDARY)
    assert ids_root(MANIFEST, [1, 2, 3]) == rfc_root(
        [leaf(ids_boundary(MANIFEST), i, ids_bytes([token])) for i, token in enumerate((1, 2, 3))]
    )
    assert ids_root(MANIFEST, [7], 5) == leaf(ids_boundary(MANIFEST), 5, ids_bytes([7]))


def test_rows_out_of_order_or_torn_are_our_own_mistake() -> None:
    """A gap, an overlap or half a row is refused at once, and the tree is unchanged."""
    tree = RowTree(BOUNDARY)
    tree.append(0, bytes(20))
    before = tree.root()
    for first, rows in ((0, bytes(10)), (3, bytes(10)), (2, bytes(9))):
        with pytest.raises(AssertionError):
            tree.append(first, rows)
    assert (len(tree), tree.root()) == (2, before)


@given(st.integers(0, 6), st.lists(st.booleans(), max_size=6), st.integers(0, PAGE_ROWS - 1))
def test_a_tree_may_take_the_root_of_a_page_for_its_rows(before: int, known: list[bool], after: int) -> None:
    """Whichever of its pages were hashed by somebody else: the same root, and rows may follow."""
    rows = rows_of((before + len(known)) * PAGE_ROWS + after)
    leaves = [leaf(BOUNDARY, i, row) for i, row in enumerate(rows)]
    tree = RowTree(BOUNDARY)
    tree.append(0, b"".join(rows[: before * PAGE_ROWS]))
    for is_known in known:
        start = len(tree)
        page = leaves[start : start + PAGE_ROWS]
        assert page_roots(b"".join(page)) == [tree_root(page)]
        if is_known:
            tree.append_page(start, *page_roots(b"".join(page)))
        else:
            tree.append_leaves(start, b"".join(page))
    tree.append(len(tree), b"".join(rows[len(tree) :]))
    assert tree.root() == rfc_root(leaves) and len(tree) == len(rows)


@given(st.integers(0, 9), st.booleans(), st.integers(0, PAGE_ROWS - 1))
def test_the_root_of_what_may_follow_is_known_without_its_following(pages: int, full: bool, after: int) -> None:
    rows = rows_of((pages + full) * PAGE_ROWS + after)
    leaves = [leaf(BOUNDARY, i, row) for i, row in enumerate(rows)]
    tree = RowTree(BOUNDARY)
    tree.append(0, b"".join(rows[: pages * PAGE_ROWS]))
    before = tree.root()
    page = tree_root(leaves[pages * PAGE_ROWS : (pages + 1) * PAGE_ROWS]) if full else None
    assert tree.root_behind(page, b"".join(leaves[(pages + full) * PAGE_ROWS :])) == rfc_root(leaves)
    assert tree.root() == before and len(tree) == pages * PAGE_ROWS


def test_a_page_behind_half_a_page_or_out_of_place_is_our_own_mistake() -> None:
    tree = RowTree(BOUNDARY)
    tree.append(0, bytes(BOUNDARY.row_bytes * PAGE_ROWS))
    for extra, first in ((0, 0), (1, PAGE_ROWS + 1)):
        tree.append(len(tree), bytes(BOUNDARY.row_bytes * extra))
        with pytest.raises(AssertionError):
            tree.append_page(first, bytes(32))
