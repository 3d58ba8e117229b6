"""The rows of a step in which each is the next of its sequence, or a guess behind it, as a decode step takes them.

A sequence may have several rows there: each attends for itself, to keys that all of them have written before.
"""

from __future__ import annotations

import numpy as np

from serve_app.engine.request_table import Ints, PlannedSpans


def decode_rows(spans: PlannedSpans, page_size: int, table_width: int) -> Ints | None:
    """[3, rows] int32: slot, position and new page (-1: none) of each; None if a page comes that no row begins.

    table_width: pages of one slot.
    """
    counts = spans.counts
    first = np.cumsum(counts, dtype=np.int32) - counts
    out = np.empty((3, int(counts.sum())), np.int32)
    out[0], out[1], out[2] = np.repeat(spans.slots, counts), np.repeat(spans.starts - first, counts), -1
    out[1] += np.arange(out.shape[1], dtype=np.int32)
    if len(spans.pages):
        of = np.repeat(np.arange(len(counts)), spans.new_pages)
        row = spans.page_places % table_width * page_size - spans.starts[of]
        if ((row < 0) | (row >= counts[of])).any():
            return None
        out[2, first[of] + row] = spans.pages
    return out


def leading(spans: PlannedSpans, max_rows: int) -> tuple[int, int]:
    """How many spans at the start of a step attend as decode rows do, and how many rows these have."""
    alike = (spans.counts == 1) | spans.each
    n = len(alike) if alike.all() else int(np.argmin(alike))
    rows = np.cumsum(spans.counts[:n])
    n = int(np.searchsorted(rows, max_rows, "right"))
    return n, int(rows[n - 1]) if n else 0
