"""The compiled hashes are those of Python's hashlib, whatever the rows."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.native_build import ROW_HASHES, NativeSource, native_library
from serve_app.receipts import rows_native
from serve_app.receipts.rows import PAGE_ROWS, Boundary, RowTree, ids_bytes, ids_root, leaves_of, page_roots
from shard_tools.cid import Cid, Codec
from tests.serve_app.receipts.test_rows import MANIFEST

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@contextlib.contextmanager
def without_library() -> Iterator[None]:
    """As on a machine without a compiler."""
    assert rows_native.prepare()
    held, rows_native._library = rows_native._library, None
    try:
        yield
    finally:
        rows_native._library = held


@given(
    st.sampled_from([("ids", 1, 0), ("bfloat16", 1, 2), ("float16", 29, 2), ("float32", 144, 7)]),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 5)), max_size=5),
    st.randoms(use_true_random=False),
)
def test_leaves_are_the_same(kind: tuple[str, int, int], spans: list[tuple[int, int]], random: object) -> None:
    """Rows of 2 to 576 bytes: their ends fall before, on and behind the end of a block of SHA-256."""
    dtype, width, layer = kind
    boundary = Boundary(MANIFEST, layer, dtype, width)  # type: ignore[arg-type]
    rows = random.randbytes(boundary.row_bytes * sum(count for _, count in spans))  # type: ignore[attr-defined]
    with without_library():
        expected = leaves_of(boundary, spans, rows)
    assert leaves_of(boundary, spans, memoryview(rows)) == expected


@pytest.mark.parametrize("row_bytes", [*range(2, 140, 2), 4096, 8192])
def test_every_length_of_a_row_is_padded_as_sha256_says(row_bytes: int) -> None:
    boundary = Boundary(MANIFEST, 1, "bfloat16", row_bytes // 2)
    rows = (bytes(range(256)) * 64)[: 2 * row_bytes]
    with without_library():
        expected = leaves_of(boundary, [(3, 2)], rows)
    assert leaves_of(boundary, [(3, 2)], rows) == expected


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_roots_of_pages_are_the_same(pages: int) -> None:
    leaves = bytes(i * 7 % 251 for i in range(32 * PAGE_ROWS * pages))
    with without_library():
        expected = page_roots(leaves)
    assert rows_native.prepare()
    assert page_roots(leaves) == expected and len(expected) == pages


@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 100, 257, 5000])
def test_roots_over_ids_are_the_same(n: int) -> None:
    """5000 ids are past what is remembered."""
    manifest = Cid.of(Codec.DAG_CBOR, b"%d" % n)
    ids = [i * 7919 % 152_000 for i in range(n)]
    assert rows_native.prepare()
    found = ids_root(manifest, ids, 11)
    tree = RowTree(Boundary(manifest, 0, "ids", 1), 11)
    with without_library():
        tree.append(11, ids_bytes(ids))
    assert found == tree.root()


def test_rows_that_are_not_those_of_the_spans_are_our_own_mistake() -> None:
    """They would be read beyond their end."""
    assert rows_native.prepare()
    with pytest.raises(AssertionError):
        leaves_of(Boundary(MANIFEST, 0, "ids", 1), [(0, 3)], bytes(8))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="there is one way only")
def test_a_processor_without_a_unit_for_it_hashes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source, made as for such a processor."""
    plain = tmp_path / "rows.cpp"
    plain.write_text(re.sub(r"#if defined\(__SHA__\).*", "#if 0", ROW_HASHES.path.read_text()))
    source = NativeSource(plain, "")
    assert native_library(source, tmp_path / "cache") is not None
    monkeypatch.setattr(rows_native, "ROW_HASHES", source)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    library = rows_native._load()
    assert library is not None
    monkeypatch.setattr(rows_native, "_library", library)
    monkeypatch.setattr(rows_native, "_tried", True)
    test_roots_of_pages_are_the_same(3)
    test_roots_over_ids_are_the_same(101)
    test_every_length_of_a_row_is_padded_as_sha256_says(54)
