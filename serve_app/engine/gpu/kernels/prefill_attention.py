"""Many new rows per sequence attend causally to the keys and values of their sequences, in pages.

Equals softmax(q k^T * scale) v with each row seeing positions up to its own, softmax in float32. The new rows' keys
and values are in the pages already. A program takes BLOCK_M (row, query head) pairs of one sequence and one KV head.
Source: Dao 2023, "FlashAttention-2", algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.decode_attention import LOG2E

BLOCK_M = 128


@triton.jit
def _attend_rows(
    q,
    keys,
    values,
    scales,
    out,
    page_table,
    tiles,
    sinks,
    scale,
    softcap,
    window,
    value_scales,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EIGHT: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    slot = tl.load(tile)
    row = tl.load(tile + 1)  # in q, of the tile's first row
    count = tl.load(tile + 2)  # rows of the tile
    start = tl.load(tile + 3)  # position of its first row

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK_N)
    token = offs_m // GROUP
    heads = head * GROUP + offs_m % GROUP
    real = token < count
    at_q = ((row + token) * (KV_HEADS * GROUP) + heads)[:, None].to(tl.int64) * DIM + offs_d[None, :]
    query = tl.load(q + at_q, mask=real[:, None], other=0.0)
    mine = start + token
    table = page_table + slot.to(tl.int64) * table_stride

    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    end = start + count
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
    for n in range(begin, end, BLOCK_N):
        at = n + offs_n
        page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
        cell = (page * KV_HEADS + head) * PAGE + at % PAGE
        k = tl.load(keys + cell[None, :] * DIM + offs_d[:, None])
        scores = tl.dot(query, k.to(query.dtype), input_precision="ieee") * scale
        if EIGHT:
            scores *= tl.load(scales + cell)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E) / softcap) + 1.0))
        seen = at[None, :] <= mine[:, None]
        if HAS_WINDOW:
            seen = seen & (at[None, :] > mine[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
        v = tl.load(values + cell[:, None] * DIM + offs_d[None, :], mask=(at < end)[:, None], other=0.0).to(query.dtype)
        total = total * shrink + tl.sum(weights, 1)
        if EIGHT:
            weights *= tl.load(scales + value_scales + cell, mask=at < end, other=0.0)[None, :]
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + heads).to(tl.float32) * LOG2E - top)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at_q, acc.to(out.dtype.element_ty), mask=real[:, None])


def rows_per_tile(heads: int, kv_heads: int) -> int:
    """How many rows of one sequence a tile may hold."""
    return BLOCK_M // (heads // kv_heads)


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    tiles: Tensor,
    *,
    out: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: Tensor | None = None,
    block: int = 64,
    warps: int = 8,
    stages: int = 2,
) -> None:
    """Write to out [rows, heads, dim] for the rows the tiles name, as decode_attention has its arguments.

    tiles [n, 4] int32: slot, first row in q, rows (at most rows_per_tile), position of the first row.
    """
    heads, dim = q.shape[1:]
    kv_heads, page = keys.shape[1], keys.shape[2]
    _attend_rows[(kv_heads, len(tiles))](
        q,
        keys,
        values,
        scales,
        out,
        page_table,
        tiles,
        sinks,
        scale,
        softcap or 0.0,
        window or 0,
        scales.stride(0) if scales is not None else 0,
        page_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE=page,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        EIGHT=scales is not None,
        num_warps=warps,
        num_stages=stages,
    )
