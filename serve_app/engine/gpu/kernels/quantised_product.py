"""Products with a weight of small numbers: they are widened in registers, so that memory gives 8 or 4 bits a weight.

Equals x @ w.T + bias, accumulated in float32, w being the shard's values: rows of int8 or e4m3 are multiplied with
their scale after they are summed up, groups of four-bit inputs before, which is exact in bfloat16
(shard_tools/quantised.py). So every number of rows computes with the same weights. Four-bit rows are laid out anew when
they are loaded (`halved`): byte j holds input j in its low half and input j + width / 2 in its high one, so that each
half of a tile of bytes meets inputs that lie side by side. With `gated` the weight holds gate rows, then up rows, and
out = act(gate) * up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.block import Activation, Integers
from serve_app.engine.gpu.kernels.activation import activate
from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs
from shard_tools.quantised import GROUP


def halved(stored: Tensor) -> Tensor:
    """uint8 [..., in / 2] as a shard holds it, in the layout of these kernels. in / 2: a multiple of GROUP."""
    assert stored.shape[-1] % GROUP == 0
    inputs = torch.stack((stored & 15, stored >> 4), -1).view(*stored.shape[:-1], 2, -1)
    return (inputs[..., 0, :] | inputs[..., 1, :] << 4).contiguous()


@triton.jit
def _one_row(
    x,
    weight,
    scales,
    out,
    bias,
    n_out,
    WIDTH: tl.constexpr,
    FOUR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    # Bytes of a row are taken GROUPS times 32 at a time; [outputs, groups, 32] all along, as a scale is of a group.
    n_bytes: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_g = tl.arange(0, GROUPS)
    offs_k = offs_g[:, None] * 32 + tl.arange(0, 32)[None, :]
    real = at_n < n_out
    # The first weights are on their way before the row they are multiplied with is there.
    w = row_bytes(weight, at_n, real, 0, n_bytes, GROUPS)
    w_up = w
    if GATED:
        w_up = row_bytes(weight, at_n + n_out, real, 0, n_bytes, GROUPS)
    wait_for_inputs(EARLY)
    acc = tl.zeros([BLOCK_N, GROUPS, 32], tl.float32)
    acc_up = tl.zeros([BLOCK_N, GROUPS, 32], tl.float32)
    for k in tl.static_range(0, n_bytes, GROUPS * 32):
        at_k = k + offs_k
        inside = at_k < n_bytes
        if k > 0:
            w = row_bytes(weight, at_n, real, k, n_bytes, GROUPS)
            if GATED:
                w_up = row_bytes(weight, at_n + n_out, real, k, n_bytes, GROUPS)
        xv = tl.load(x + at_k, mask=inside, other=0.0).to(tl.float32)[None, :, :]
        x_high = xv
        if FOUR:
            x_high = tl.load(x + n_bytes + at_k, mask=inside, other=0.0).to(tl.float32)[None, :, :]
        acc = add_row(acc, w, xv, x_high, scales, at_n, real, k, n_bytes, FOUR, GROUPS)
        if GATED:
            acc_up = add_row(acc_up, w_up, xv, x_high, scales, at_n + n_out, real, k, n_bytes, FOUR, GROUPS)
    y = tl.sum(tl.sum(acc, 2), 1)
    up_y = tl.sum(tl.sum(acc_up, 2), 1)
    if not FOUR:
        y *= tl.load(scales + at_n, mask=real, other=0.0).to(tl.float32)
        if GATED:
            up_y *= tl.load(scales + n_out + at_n, mask=real, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + at_n, mask=real, other=0.0).to(tl.float32)
    if GATED:
        y = activate(y.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * up_y.to(kind).to(tl.float32)
    tl.store(out + at_n, y.to(kind), mask=real)


@triton.jit
def row_bytes(weight, at_n, real, k, N_BYTES: tl.constexpr, GROUPS: tl.constexpr):
    """[outputs, GROUPS, 32]: bytes k ... of each output's row."""
    at_k = k + tl.arange(0, GROUPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    both = real[:, None, None] & (at_k < N_BYTES)[None, :, :]
    return tl.load(weight + at_n.to(tl.int64)[:, None, None] * N_BYTES + at_k[None, :, :], mask=both, other=0.0)


@triton.jit
def add_row(
    acc, w, x_low, x_high, scales, at_n, real, k, N_BYTES: tl.constexpr, FOUR: tl.constexpr, GROUPS: tl.constexpr
):
    """acc [outputs, GROUPS, 32] with the products of those bytes added."""
    if FOUR:
        at_g = k // 32 + tl.arange(0, GROUPS)
        groups: tl.constexpr = N_BYTES // 32  # of each half
        s_at = scales + at_n.to(tl.int64)[:, None] * (2 * groups) + at_g[None, :]
        s_real = real[:, None] & (at_g < groups)[None, :]
        low_s = tl.load(s_at, mask=s_real, other=0.0).to(tl.float32)[:, :, None]
        high_s = tl.load(s_at + groups, mask=s_real, other=0.0).to(tl.float32)[:, :, None]
        acc += four_bits(w, False, tl.float32) * low_s * x_low
        acc += four_bits(w, True, tl.float32) * high_s * x_high
    else:
        acc += w.to(tl.float32) * x_low
    return acc


@triton.jit
def four_bits(w, high: tl.constexpr, kind: tl.constexpr):
    """The four-bit integers in the low or high halves of bytes w, less eight, exact.

    They are put into the low bits of the significand of 2^23, or of 2^7 in bfloat16: a logical instruction and a sum,
    where a conversion takes four times as long.
    """
    if kind == tl.bfloat16:
        bits = w.to(tl.int16)
        bits = ((bits >> 4) if high else (bits & 15)) | 0x4300
        return bits.to(tl.bfloat16, bitcast=True) - tl.full([], 136.0, tl.bfloat16)
    else:
        wide = w.to(tl.int32)
        wide = ((wide >> 4) if high else (wide & 15)) | 0x4B000000
        return (wide.to(tl.float32, bitcast=True) - 8388616.0).to(kind)


@triton.jit(do_not_specialize=["n_rows"])
def _rows(
    x,
    weight,
    scales,
    out,
    bias,
    n_rows,
    n_out,
    WIDTH: tl.constexpr,
    FOUR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # No weight should be widened by several warps. Of few rows these share out the outputs, weights being the right
    # operand; from 64 rows on weights are the left one, which the matrix units take from registers.
    n_bytes: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    pid_n, pid_m = _place(tl.program_id(0), tl.cdiv(n_out, BLOCK_N), tl.cdiv(n_rows, BLOCK_M))
    at_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    real_m = at_m < n_rows
    real_n = at_n < n_out
    kind = out.dtype.element_ty
    few: tl.constexpr = BLOCK_M < 64
    acc = tl.zeros([BLOCK_M, BLOCK_N] if few else [BLOCK_N, BLOCK_M], tl.float32)
    acc_up = acc
    for k in range(0, n_bytes, BLOCK_K):
        at_k = k + offs_k
        x_at = x + at_m[:, None] * WIDTH + at_k[None, :]
        both = real_m[:, None] & (at_k < n_bytes)[None, :]
        xv = tl.load(x_at, mask=both, other=0.0)
        x_high = xv
        if FOUR:
            x_high = tl.load(x_at + n_bytes, mask=both, other=0.0)
        acc = add_tile(acc, xv, x_high, weight, scales, at_n, real_n, k, kind, n_bytes, FOUR, few, BLOCK_N, BLOCK_K)
        if GATED:
            acc_up = add_tile(
                acc_up, xv, x_high, weight, scales, at_n + n_out, real_n, k, kind, n_bytes, FOUR, few, BLOCK_N, BLOCK_K
            )
    if not few:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if not FOUR:
        acc *= tl.load(scales + at_n, mask=real_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up *= tl.load(scales + n_out + at_n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + at_n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = activate(acc.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * acc_up.to(kind).to(tl.float32)
    at = at_m[:, None] * n_out + at_n[None, :]
    tl.store(out + at, acc.to(kind), mask=real_m[:, None] & real_n[None, :])


@triton.jit
def _place(program, n_tiles, m_tiles):
    """Tiles of eight rows of tiles run beside each other, so that weights are read from memory once for all of them."""
    group = program // (n_tiles * 8)
    height = tl.minimum(m_tiles - group * 8, 8)
    inside = program - group * n_tiles * 8
    return inside // height, group * 8 + inside % height


@triton.jit
def add_tile(
    acc,
    x_low,
    x_high,
    weight,
    scales,
    at_n,
    real,
    k,
    kind: tl.constexpr,
    N_BYTES: tl.constexpr,
    FOUR: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc [rows, BLOCK_N] if few, else [BLOCK_N, rows], with the products of bytes k ... of each output's row added."""
    at_k = k + tl.arange(0, BLOCK_K)
    both = real[:, None] & (at_k < N_BYTES)[None, :]
    w = tl.load(weight + at_n.to(tl.int64)[:, None] * N_BYTES + at_k[None, :], mask=both, other=0.0)
    if FOUR:
        groups: tl.constexpr = N_BYTES // 32  # of each half
        at_g = k // 32 + tl.arange(0, BLOCK_K // 32)
        s_at = scales + at_n.to(tl.int64)[:, None] * (2 * groups) + at_g[None, :]
        s_real = real[:, None] & (at_g < groups)[None, :]
        low = _scaled(w, False, tl.load(s_at, mask=s_real, other=0.0), kind, BLOCK_N, BLOCK_K)
        acc = _dot(low, x_low, acc, FEW)
        high = _scaled(w, True, tl.load(s_at + groups, mask=s_real, other=0.0), kind, BLOCK_N, BLOCK_K)
        acc = _dot(high, x_high, acc, FEW)
    else:
        acc = _dot(w.to(kind), x_low, acc, FEW)
    return acc


@triton.jit
def _dot(w, x, acc, FEW: tl.constexpr):
    if FEW:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    else:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def _scaled(w, high: tl.constexpr, scales, kind: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Half of the bytes [BLOCK_N, BLOCK_K] times the scale of their 32, exact before it is rounded to `kind`."""
    spread = tl.broadcast_to(scales[:, :, None], (BLOCK_N, BLOCK_K // 32, 32))
    spread = tl.reshape(spread, (BLOCK_N, BLOCK_K))
    if kind == tl.bfloat16:
        return four_bits(w, high, kind) * spread
    return (four_bits(w, high, tl.float32) * spread.to(tl.float32)).to(kind)


@triton.jit
def _widen(weight, scales, out, n_out, WIDTH: tl.constexpr, FOUR: tl.constexpr, BLOCK: tl.constexpr):
    # Four bits: with their scales. Eight: the numbers alone.
    n_bytes: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < n_bytes
    kind = out.dtype.element_ty
    w = tl.load(weight + row * n_bytes + at, mask=real, other=0.0)
    to = out + row * WIDTH + at
    if FOUR:
        s_at = scales + row * (WIDTH // 32) + at // 32
        low_s = tl.load(s_at, mask=real, other=0.0).to(tl.float32)
        high_s = tl.load(s_at + n_bytes // 32, mask=real, other=0.0).to(tl.float32)
        tl.store(to, (((w & 15).to(tl.int8) - 8).to(tl.float32) * low_s).to(kind), mask=real)
        tl.store(to + n_bytes, (((w >> 4).to(tl.int8) - 8).to(tl.float32) * high_s).to(kind), mask=real)
    else:
        tl.store(to, w.to(tl.float32).to(kind), mask=real)


@triton.jit
def _look_up(ids, weight, scales, out, WIDTH: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    id = tl.load(ids + row).to(tl.int64)
    w = tl.load(weight + id * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.store(
        out + row * WIDTH + at, (w * tl.load(scales + id).to(tl.float32)).to(out.dtype.element_ty), mask=at < WIDTH
    )


def quantised_product(
    x: Tensor,
    weight: Integers,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: Activation = "silu",
    block_m: int = 64,
    block_n: int = 64,
    block_k: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """x [rows, width], weight [n, width] -> out [rows, n] (gated: [rows, n / 2]).

    bias [n], not with gated. block_m 1: one row, on the ordinary cores. block_k: bytes of a row at a time.
    """
    rows, width = x.shape
    four = weight.stored.dtype == torch.uint8
    n_out = len(weight.stored) // 2 if gated else len(weight.stored)
    assert weight.shape[1] == width and x.is_contiguous() and weight.stored.is_contiguous()
    assert weight.scales.is_contiguous() and out.is_contiguous() and not (gated and bias is not None)
    shared = dict(
        WIDTH=width,
        FOUR=four,
        BLOCK_N=block_n,
        GATED=gated,
        GELU=activation == "gelu_tanh",
        HAS_BIAS=bias is not None,
        num_warps=warps,
        num_stages=stages,
    )
    if block_m == 1:
        assert rows == 1
        early = starts_early(rows)
        _one_row[(triton.cdiv(n_out, block_n),)](
            x, weight.stored, weight.scales, out, bias, n_out,
            GROUPS=block_k // 32, EARLY=early, launch_pdl=early, **shared,
        )  # fmt: skip
    else:
        tiles = triton.cdiv(n_out, block_n) * triton.cdiv(rows, block_m)
        _rows[(tiles,)](
            x, weight.stored, weight.scales, out, bias, rows, n_out, BLOCK_M=block_m, BLOCK_K=block_k, **shared
        )


def widen(weight: Integers, out: Tensor) -> None:
    """out [n, width]: four-bit weights, or 8-bit numbers without their scales, in the dtype of `out`, exact in it."""
    (n_out, width), four = weight.shape, weight.stored.dtype == torch.uint8
    block = 1024
    _widen[(n_out, triton.cdiv(weight.stored.shape[1], block))](
        weight.stored, weight.scales, out, n_out, WIDTH=width, FOUR=four, BLOCK=block, num_warps=4
    )


def look_up(ids: Tensor, weight: Integers, out: Tensor) -> None:
    """out [rows, width]: rows `ids` [rows] of an 8-bit weight, times their scales."""
    width = weight.shape[1]
    _look_up[(len(ids),)](
        ids, weight.stored, weight.scales, out, WIDTH=width, PAD=triton.next_power_of_2(width), num_warps=4
    )
