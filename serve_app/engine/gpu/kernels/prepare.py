"""What a decode step needs before its first layer, made on the device from one small copy of the plan.

For each row: the page it starts is put in its sequence's table, an id that says "drawn last" becomes the token, and
the length that attention reads is the position and one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

N_FIELDS = (
    4  # int32 rows of a plan on the device: id (-1: drawn last), slot (-1: no row), position, new page (-1: none)
)


@triton.jit(do_not_specialize=["n_rows", "stride"])
def _prepare(
    fields,
    stride,
    last_tokens,
    page_table,
    table_stride,
    ids,
    slots,
    positions,
    lengths,
    n_rows,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < n_rows
    id = tl.load(fields + row, mask=here, other=0)
    slot = tl.load(fields + stride + row, mask=here, other=-1)
    position = tl.load(fields + 2 * stride + row, mask=here, other=0)
    page = tl.load(fields + 3 * stride + row, mask=here, other=-1)
    real = here & (slot >= 0)
    at = page_table + slot.to(tl.int64) * table_stride + position // PAGE
    tl.store(at, page, mask=real & (page >= 0))
    last = tl.load(last_tokens + slot, mask=real & (id < 0), other=0)
    tl.store(ids + row, tl.where(id < 0, last, id), mask=here)
    tl.store(slots + row, slot, mask=here)
    tl.store(positions + row, position, mask=here)
    tl.store(lengths + row, tl.where(real, position + 1, 0), mask=here)


def prepare(
    fields: Tensor,
    last_tokens: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    ids: Tensor,
    slots: Tensor,
    positions: Tensor,
    lengths: Tensor,
) -> None:
    """fields [N_FIELDS, rows] int32 -> ids, slots, positions, lengths [rows] int32; page_table changes."""
    rows = fields.shape[1]
    _prepare[(triton.cdiv(rows, 256),)](
        fields,
        fields.stride(0),
        last_tokens,
        page_table,
        page_table.stride(0),
        ids,
        slots,
        positions,
        lengths,
        rows,
        PAGE=page_size,
        BLOCK=256,
        num_warps=4,
    )
