"""The hashes of rows.py, many in one call and without holding up other threads: what a serving process asks for.

Python's hashlib takes a microsecond a hash under the interpreter's lock; a step of 256 rows asks for a thousand.
Whoever only checks receipts needs none of this: until `prepare` is called, and wherever no compiler is, rows.py's own
lines run. So numpy, which takes the address of any buffer, is imported by those calls alone.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from serve_app.native_build import ROW_HASHES, load_library

_P, _I = ctypes.c_void_p, ctypes.c_int64
_lock = threading.Lock()
_tried = False
_library: Any = None


def prepare() -> bool:
    """Make the library ready, compiled if need be (a second); whether there is one. Safe to call again."""
    global _tried, _library  # one library per process, as the loader has it
    with _lock:
        if not _tried:
            _tried = True
            _library = _load()
    return _library is not None


def is_ready() -> bool:
    """Whether the calls below can be made."""
    return _library is not None


def leaves(prefix: bytes, spans: list[tuple[int, int]], rows: bytes | memoryview, row_bytes: int) -> bytes:
    """32 bytes a row; as rows.leaves_of."""
    import numpy as np

    runs = np.array(spans, np.int64).reshape(-1, 2)
    out = np.empty(32 * int(runs[:, 1].sum()), np.uint8)
    _library.llmd_leaves(prefix, runs.ctypes.data, len(runs), _address(rows), row_bytes, out.ctypes.data)
    return out.tobytes()


def page_roots(hashes: bytes, pages: int) -> bytes:
    """32 bytes a page; as rows.page_roots."""
    out = ctypes.create_string_buffer(32 * pages)
    _library.llmd_page_roots(_address(hashes), pages, out)
    return out.raw


def rows_root(prefix: bytes, first: int, rows: bytes | memoryview, row_bytes: int) -> bytes:
    """32 bytes: the root over at least one row, the first of which stands at position `first`."""
    out = ctypes.create_string_buffer(32)
    _library.llmd_rows_root(prefix, first, len(rows) // row_bytes, _address(rows), row_bytes, out)
    return out.raw


def _address(data: bytes | memoryview) -> int:
    import numpy as np

    # The caller holds the buffer while it is read.
    return int(np.frombuffer(data, np.uint8).ctypes.data) if len(data) else 0


def _load() -> Any:
    library = load_library(ROW_HASHES)
    if library is None:
        return None
    library.llmd_leaves.argtypes = [ctypes.c_char_p, _P, _I, _P, _I, _P]
    library.llmd_page_roots.argtypes = [_P, _I, _P]
    library.llmd_rows_root.argtypes = [ctypes.c_char_p, _I, _I, _P, _I, _P]
    for function in (library.llmd_leaves, library.llmd_page_roots, library.llmd_rows_root):
        function.restype = None
    return library
