"""Products of rows with the matrices of the experts they go to, [experts, out, in], accumulated in float32.

One row reads the matrices of its experts as skinny_product.py reads one; more rows stand sorted by expert (route.py),
and a tile is of one expert's rows. Then each row's experts are added up, times their weights, in float32. Matrices of
small numbers are computed with as in quantised_product.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.block import Activation, Linear
from serve_app.engine.gpu.kernels.activation import activate
from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs
from serve_app.engine.gpu.kernels.quantised_product import add_tile


@triton.jit
def _grouped(
    x,
    weight,
    scales,
    out,
    order,
    tiles,
    n_out,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    SMALL: tl.constexpr,
    FOUR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * 3
    n = tl.load(tile + 2)
    if n == 0:
        return
    expert = tl.load(tile).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    real_m = offs_m < n
    place = (tl.load(tile + 1) + offs_m).to(tl.int64)
    pair = tl.load(order + place, mask=real_m, other=0).to(tl.int64)
    rows_in = place
    rows_out = pair
    if GATED:
        rows_in = pair // TOP
        rows_out = place
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_n = at_n < n_out
    offs_k = tl.arange(0, BLOCK_K)
    all_out = n_out
    if GATED:
        all_out = 2 * n_out
    rows_w = expert * all_out + at_n
    w_at = weight + rows_w[None, :] * WIDTH
    kind = out.dtype.element_ty
    few: tl.constexpr = BLOCK_M < 64 or not SMALL
    n_bytes: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    acc = tl.zeros([BLOCK_M, BLOCK_N] if few else [BLOCK_N, BLOCK_M], tl.float32)
    acc_up = acc
    for k in range(0, n_bytes, BLOCK_K):
        at_k = k + offs_k
        inside = at_k < n_bytes
        x_at = x + rows_in[:, None] * WIDTH + at_k[None, :]
        xv = tl.load(x_at, mask=real_m[:, None] & inside[None, :], other=0.0)
        if SMALL:
            x_high = xv
            if FOUR:
                x_high = tl.load(x_at + n_bytes, mask=real_m[:, None] & inside[None, :], other=0.0)
            acc = add_tile(
                acc, xv, x_high, weight, scales, rows_w, real_n, k, kind, n_bytes, FOUR, few, BLOCK_N, BLOCK_K
            )
            if GATED:
                up_w = rows_w + n_out
                acc_up = add_tile(
                    acc_up, xv, x_high, weight, scales, up_w, real_n, k, kind, n_bytes, FOUR, few, BLOCK_N, BLOCK_K
                )
        else:
            both = real_n[None, :] & inside[:, None]
            acc = tl.dot(xv, tl.load(w_at + at_k[:, None], mask=both, other=0.0), acc, input_precision="ieee")
            if GATED:
                up = tl.load(w_at + n_out.to(tl.int64) * WIDTH + at_k[:, None], mask=both, other=0.0)
                acc_up = tl.dot(xv, up, acc_up, input_precision="ieee")
    if not few:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if SMALL and not FOUR:
        acc *= tl.load(scales + rows_w, mask=real_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up *= tl.load(scales + rows_w + n_out, mask=real_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = activate(acc.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * acc_up.to(kind).to(tl.float32)
    at = rows_out[:, None] * n_out + at_n[None, :]
    tl.store(out + at, acc.to(kind), mask=real_m[:, None] & real_n[None, :])


@triton.jit
def _add_up(parts, weights, out, WIDTH: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < WIDTH
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP):
        part = tl.load(parts + (row * TOP + k) * WIDTH + at, mask=real, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + row * TOP + k)
    tl.store(out + row * WIDTH + at, acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def _one_row_up(
    x,
    weight,
    out,
    ids,
    n_out,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = at_n < n_out
    wait_for_inputs(EARLY)
    expert = tl.load(ids + tl.program_id(1)).to(tl.int64)
    rows = weight + (expert * 2 * n_out + at_n)[:, None] * WIDTH
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        at_k = k + tl.arange(0, BLOCK_K)
        inside = at_k < WIDTH
        both = real[:, None] & inside[None, :]
        xv = tl.load(x + at_k, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(rows + at_k[None, :], mask=both, other=0.0).to(tl.float32) * xv
        up = tl.load(rows + n_out.to(tl.int64) * WIDTH + at_k[None, :], mask=both, other=0.0)
        acc_up += up.to(tl.float32) * xv
    kind = out.dtype.element_ty
    y = activate(tl.sum(acc, 1).to(kind).to(tl.float32), GELU).to(kind).to(tl.float32)
    y *= tl.sum(acc_up, 1).to(kind).to(tl.float32)
    tl.store(out + tl.program_id(1) * n_out + at_n, y.to(kind), mask=real)


@triton.jit
def _one_row_down(
    x,
    weight,
    out,
    ids,
    weights,
    n_out,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = at_n < n_out
    kind = out.dtype.element_ty
    whole = tl.zeros([BLOCK_N], tl.float32)
    wait_for_inputs(EARLY)
    for i in range(TOP):
        expert = tl.load(ids + i).to(tl.int64)
        rows = weight + (expert * n_out + at_n)[:, None] * WIDTH
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for k in tl.static_range(0, WIDTH, BLOCK_K):
            at_k = k + tl.arange(0, BLOCK_K)
            inside = at_k < WIDTH
            xv = tl.load(x + i * WIDTH + at_k, mask=inside, other=0.0).to(tl.float32)[None, :]
            w = tl.load(rows + at_k[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            acc += w.to(tl.float32) * xv
        whole += tl.sum(acc, 1).to(kind).to(tl.float32) * tl.load(weights + i)
    tl.store(out + at_n, whole.to(kind), mask=real)


def grouped_product(
    x: Tensor,
    weight: Linear,
    out: Tensor,
    order: Tensor,
    tiles: Tensor,
    n_tiles: int,
    top: int,
    *,
    gated: bool,
    activation: Activation = "silu",
    block_m: int = 64,
    block_n: int = 64,
    block_k: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """gated: x [rows, in] -> out [pairs, inner], sorted by expert; else x [pairs, inner] -> out [pairs, in], by pair.

    weight [experts, out, in], gated [experts, 2 * inner, in]: gate rows, then up rows. order, tiles: of sort_pairs with
    tiles of block_m. block_k: inputs at a time, of small numbers bytes.
    """
    (n_all, width), small = weight.shape, weight.integers
    n_out = n_all // 2 if gated else n_all
    stored, scales = (weight.weight, None) if small is None else (small.stored, small.scales)
    assert x.is_contiguous() and stored.is_contiguous() and x.shape[1] == width
    _grouped[(triton.cdiv(n_out, block_n), n_tiles)](
        x,
        stored,
        scales,
        out,
        order,
        tiles,
        n_out,
        WIDTH=width,
        TOP=top,
        GATED=gated,
        GELU=activation == "gelu_tanh",
        SMALL=small is not None,
        FOUR=stored.dtype == torch.uint8,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )


def add_up(parts: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [rows, hidden] = the sum of parts [rows * top, hidden] times weights [rows, top]."""
    (rows, top), width, block = weights.shape, out.shape[1], 1024
    _add_up[(rows, triton.cdiv(width, block))](parts, weights, out, WIDTH=width, TOP=top, BLOCK=block, num_warps=4)


def one_row_of_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, inner: Tensor, out: Tensor,
    activation: Activation,
) -> None:  # fmt: skip
    """x [1, hidden] -> out [1, hidden], by the experts ids [1, top] with weights [1, top]. inner [top, inner]: room."""
    top, width, n_inner = ids.shape[1], x.shape[1], gate_up.shape[1] // 2
    early, block_n = starts_early(1), 2
    _one_row_up[(triton.cdiv(n_inner, block_n), top)](
        x,
        gate_up,
        inner,
        ids,
        n_inner,
        WIDTH=width,
        GELU=activation == "gelu_tanh",
        BLOCK_N=block_n,
        BLOCK_K=_block_of(width),
        num_warps=4,
        EARLY=early,
        launch_pdl=early,
    )
    _one_row_down[(triton.cdiv(width, block_n),)](
        inner,
        down,
        out,
        ids,
        weights,
        width,
        WIDTH=n_inner,
        TOP=top,
        BLOCK_N=block_n,
        BLOCK_K=_block_of(n_inner),
        num_warps=4,
        EARLY=early,
        launch_pdl=early,
    )


def _block_of(width: int) -> int:
    return int(min(2048, triton.next_power_of_2(width)))
