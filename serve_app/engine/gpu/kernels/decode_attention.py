"""One new row per sequence attends to all keys and values of its sequence, in pages.

Equals softmax(q k^T * scale) v over the positions the row may see, softmax in float32. Two launches: every program of
the first takes one part of one sequence for the query heads that share one KV head, so that keys are read once;
the second joins the parts. The number of parts is fixed by the caller and lengths are read on the device, so a CUDA
graph may hold both. With the same number of parts a row's bits do not depend on what else is in the batch.
Source: the split-KV scheme of Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
MIN_PART = 256  # positions: a shorter part costs more to start and to join than it saves


@triton.jit
def _attend_part(
    q,
    keys,
    values,
    out,
    part_out,
    part_stat,
    page_table,
    slots,
    lengths,
    sinks,
    scale,
    softcap,
    window,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_PART: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    parts = tl.minimum(tl.maximum((length - first + MIN_PART - 1) // MIN_PART, 1), PARTS)
    if part >= parts:
        return
    per_part = ((length - first + parts - 1) // parts + BLOCK - 1) // BLOCK * BLOCK
    begin = first + part * per_part
    end = tl.minimum(begin + per_part, length)

    offs_g = tl.arange(0, GROUP_PAD)
    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK)
    real = offs_g < GROUP
    heads = head * GROUP + offs_g
    q_at = (row * KV_HEADS * GROUP + heads)[:, None] * DIM + offs_d[None, :]
    query = tl.load(q + q_at, mask=real[:, None], other=0.0)
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride

    top = tl.full([GROUP_PAD], -1e30, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM], tl.float32)
    for n in range(begin, end, BLOCK):
        at = n + offs_n
        seen = at < end
        if HAS_WINDOW:
            seen = seen & (at >= length - window)
        page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
        base = (page * KV_HEADS + head) * (PAGE * DIM) + (at % PAGE) * DIM
        k = tl.load(keys + base[None, :] + offs_d[:, None])
        scores = tl.dot(query, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E) / softcap) + 1.0))
        scores = tl.where(seen[None, :], scores * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.where(seen[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        v = tl.load(values + base[:, None] + offs_d[None, :], mask=seen[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    if parts == 1:
        if HAS_SINKS:
            total += tl.exp2(tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E - top)
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + q_at, acc.to(out.dtype.element_ty), mask=real[:, None])
    else:
        at = (row * KV_HEADS * GROUP + heads) * PARTS + part
        tl.store(part_out + at[:, None] * DIM + offs_d[None, :], acc, mask=real[:, None])
        tl.store(part_stat + at * 2, top, mask=real)
        tl.store(part_stat + at * 2 + 1, total, mask=real)


@triton.jit
def _join_parts(
    out,
    part_out,
    part_stat,
    lengths,
    sinks,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    MIN_PART: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    parts = tl.minimum(tl.maximum((length - first + MIN_PART - 1) // MIN_PART, 1), PARTS)
    if parts == 1:
        return
    per_part = ((length - first + parts - 1) // parts + BLOCK - 1) // BLOCK * BLOCK
    offs_p = tl.arange(0, PARTS_PAD)
    offs_d = tl.arange(0, DIM)
    # Rounding a part up to whole blocks may leave the last ones without positions.
    real = (offs_p < parts) & (first + offs_p * per_part < length)
    at = (row * HEADS + head) * PARTS + offs_p
    top = tl.load(part_stat + at * 2, mask=real, other=-1e30)
    total = tl.load(part_stat + at * 2 + 1, mask=real, other=0.0)
    acc = tl.load(part_out + at[:, None] * DIM + offs_d[None, :], mask=real[:, None], other=0.0)
    best = tl.max(top, 0)
    share = tl.where(real, tl.exp2(top - best), 0.0)
    whole = tl.sum(total * share, 0)
    if HAS_SINKS:
        whole += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - best)
    joined = tl.sum(acc * share[:, None], 0) / whole
    tl.store(out + (row * HEADS + head) * DIM + offs_d, joined.to(out.dtype.element_ty))


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    out: Tensor,
    part_out: Tensor,
    part_stat: Tensor,
    parts: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    block: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """Write to out [rows, heads, dim]; row i is the last position of the sequence in slots[i].

    q [rows, heads, dim]; keys, values [pages, kv_heads, page, dim]; page_table [slots, pages of a sequence] int32;
    lengths [rows] int32, the new row counted, 0 for a row to leave alone. Work space: part_out
    [rows, heads, parts, dim] float32, part_stat [rows, heads, parts, 2] float32. dim is a power of two.
    """
    rows, heads, dim = q.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    _attend_part[(rows, kv_heads, parts)](
        q,
        keys,
        values,
        out,
        part_out,
        part_stat,
        page_table,
        slots,
        lengths,
        sinks,
        scale,
        softcap or 0.0,
        window or 0,
        page_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        PAGE=page,
        PARTS=parts,
        MIN_PART=MIN_PART,
        BLOCK=block,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        num_warps=warps,
        num_stages=stages,
    )
    if parts > 1:
        _join_parts[(rows, heads)](
            out,
            part_out,
            part_stat,
            lengths,
            sinks,
            window or 0,
            HEADS=heads,
            DIM=dim,
            PARTS=parts,
            PARTS_PAD=triton.next_power_of_2(parts),
            MIN_PART=MIN_PART,
            BLOCK=block,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            num_warps=2,
        )
