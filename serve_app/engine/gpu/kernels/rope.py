"""Between the QKV product and attention: norm of each head if the model has one, rotation, and the write into pages.

Equals, per head: q or k = norm(x) if weights are given, then x cos + rotate_half(x) sin on the first ROTARY dims;
v as it is. Keys and values go to their page at once, queries to `q_out`. Pages of 8-bit floats (e4m3) have a scale for
each position and head, of which the largest element comes to 448: a row is its numbers times its scale. The rounding
is written out, so that it has the same bits on every device; what is below 2^-6 of 448 becomes 0.
Source: Su et al. 2021, "RoFormer", in the half-split form that transformers uses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs


@triton.jit
def _eight_bits(x):
    """e4m3 numbers, still as float32, and scales of rows [rows, dim]; to nearest, ties to even."""
    top = tl.max(tl.abs(x), 1)
    scale = tl.where(top == 0.0, 1.0, top / 448.0)
    number = x / scale[:, None]
    bits = number.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    rounded = bits.to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(rounded) < 0.015625, 0.0, rounded)
    return tl.where(number == number, rounded, number), scale  # what is no number stays none


@triton.jit(do_not_specialize=["n_rows"])
def _rotate_and_write(
    qkv,
    q_out,
    keys,
    values,
    scales,
    cos,
    sin,
    q_weight,
    k_weight,
    page_table,
    slots,
    positions,
    value_scales,
    table_stride,
    eps,
    n_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GEMMA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EIGHT: tl.constexpr,
    EARLY: tl.constexpr,
):
    # One program: one row and BLOCK_H heads of it. Heads are numbered through q, k, v.
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    all_heads: tl.constexpr = HEADS + 2 * KV_HEADS
    offs = tl.arange(0, DIM)
    kind = q_out.dtype.element_ty
    wait_for_inputs(EARLY)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    here = heads < all_heads
    at = qkv + row * (all_heads * DIM) + heads[:, None] * DIM
    x = tl.load(at + offs[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(offs < half, offs + half, tl.where(offs < ROTARY, offs - half, offs))
    y = tl.load(at + partner[None, :], mask=here[:, None], other=0.0).to(tl.float32)

    is_q = heads < HEADS
    is_v = heads >= HEADS + KV_HEADS
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        wq = tl.load(q_weight + offs).to(tl.float32)[None, :]
        wk = tl.load(k_weight + offs).to(tl.float32)[None, :]
        wq2 = tl.load(q_weight + partner).to(tl.float32)[None, :]
        wk2 = tl.load(k_weight + partner).to(tl.float32)[None, :]
        w = tl.where(is_q[:, None], wq, wk)
        w2 = tl.where(is_q[:, None], wq2, wk2)
        if GEMMA:
            normed = (x * inverse * (1.0 + w)).to(kind).to(tl.float32)
            normed2 = (y * inverse * (1.0 + w2)).to(kind).to(tl.float32)
        else:
            normed = ((x * inverse).to(kind).to(tl.float32) * w).to(kind).to(tl.float32)
            normed2 = ((y * inverse).to(kind).to(tl.float32) * w2).to(kind).to(tl.float32)
        x_qk = normed
        y_qk = normed2
    else:
        x_qk = x
        y_qk = y
    position = tl.load(positions + row)
    in_rotary = offs < ROTARY
    angle = position.to(tl.int64) * half + offs % half
    c = tl.load(cos + angle, mask=in_rotary, other=1.0)[None, :]
    s = tl.load(sin + angle, mask=in_rotary, other=0.0)[None, :]
    turned = x_qk * c + tl.where(offs[None, :] < half, -y_qk, y_qk) * s

    page = tl.load(page_table + slot.to(tl.int64) * table_stride + position // PAGE).to(tl.int64)
    q_at = row * (HEADS * DIM) + heads[:, None] * DIM + offs[None, :]
    tl.store(q_out + q_at, turned.to(kind), mask=is_q[:, None])
    kv_head = tl.where(is_v, heads - HEADS - KV_HEADS, heads - HEADS)
    cell = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
    at_cell = cell[:, None] * DIM + offs[None, :]
    is_k = (heads >= HEADS) & (heads < HEADS + KV_HEADS)
    is_v = is_v & here
    if EIGHT:
        kept, scale = _eight_bits(tl.where(is_v[:, None], x, turned))
        tl.store(keys + at_cell, kept.to(keys.dtype.element_ty), mask=is_k[:, None])
        tl.store(values + at_cell, kept.to(values.dtype.element_ty), mask=is_v[:, None])
        tl.store(scales + cell, scale, mask=is_k)
        tl.store(scales + value_scales + cell, scale, mask=is_v)
    else:
        tl.store(keys + at_cell, turned.to(kind), mask=is_k[:, None])
        tl.store(values + at_cell, x.to(kind), mask=is_v[:, None])


def rotate_and_write(
    qkv: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    fixed: bool = False,
    scales: Tensor | None = None,
) -> None:
    """qkv [rows, (heads + 2 kv_heads) * dim] -> q_out [rows, heads, dim] and the rows' places in keys and values.

    cos, sin [positions, rotary / 2] float32; slots, positions [rows] int32; a row whose slot is negative is left out.
    q_weight, k_weight [dim]: RMS norms of each head (Qwen3, Gemma 3). fixed: programs of one shape for any number
    of rows. scales [2, pages, kv_heads, page] float32, of keys and of values, where these are 8-bit floats.
    """
    rows, heads, dim = q_out.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    block, early = 4 if rows >= 64 and not fixed else 1, starts_early(rows)
    _rotate_and_write[(rows, triton.cdiv(heads + 2 * kv_heads, block))](
        qkv,
        q_out,
        keys,
        values,
        scales,
        cos,
        sin,
        q_weight,
        k_weight,
        page_table,
        slots,
        positions,
        scales.stride(0) if scales is not None else 0,
        page_table.stride(0),
        eps,
        rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY=2 * cos.shape[1],
        PAGE=page,
        HAS_NORM=q_weight is not None,
        GEMMA=gemma,
        BLOCK_H=block,
        EIGHT=scales is not None,
        num_warps=1 if block == 1 else 4,
        EARLY=early,
        launch_pdl=early,
    )
