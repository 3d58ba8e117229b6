"""What a decode step needs before its first layer, made on the device from one small copy of the plan.

For each row: the page it starts is put in its sequence's table, an id that says "drawn last" becomes the token, and
the length that attention reads is the position and one. Where tokens are counted, the row's own is put in its page.
"""

from __future__ import annotations

import torch
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
    history,
    n_rows,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    HISTORY: tl.constexpr,
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
    token = tl.where(id < 0, last, id)
    tl.store(ids + row, token, mask=here)
    if HISTORY:
        old = tl.load(at, mask=real & (page < 0), other=0)
        place = tl.where(page < 0, old, page).to(tl.int64) * PAGE + position % PAGE
        tl.store(history + place, token, mask=real)
    tl.store(slots + row, slot, mask=here)
    tl.store(positions + row, position, mask=here)
    tl.store(lengths + row, tl.where(real, position + 1, 0), mask=here)


def padding(size: int, device: torch.device) -> Tensor:
    """[N_FIELDS, size]: rows that are none."""
    rows = torch.tensor([0, -1, 0, -1], dtype=torch.int32, device=device)
    return rows[:, None].expand(N_FIELDS, size)


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
    history: Tensor | None = None,
) -> None:
    """fields [N_FIELDS, rows] int32 -> ids, slots, positions, lengths [rows] int32; page_table changes.

    history [pages * page_size] int32, if given: the token at each place.
    """
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
        ids if history is None else history,
        rows,
        PAGE=page_size,
        BLOCK=256,
        HISTORY=history is not None,
        num_warps=4,
    )
