"""One row and the matrices of its experts, of small numbers: as experts.py, with quantised_product.py's widening."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.block import Activation, Integers
from serve_app.engine.gpu.kernels.activation import activate
from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs
from serve_app.engine.gpu.kernels.quantised_product import add_row, row_bytes


@triton.jit
def _products(x, weight, scales, rows_w, real, WIDTH: tl.constexpr, FOUR: tl.constexpr, BLOCK_N: tl.constexpr,
              GROUPS: tl.constexpr):  # fmt: skip
    """[BLOCK_N] float32: the row at x times rows `rows_w` of all experts' matrices."""
    n_bytes: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    acc = tl.zeros([BLOCK_N, GROUPS, 32], tl.float32)
    for k in tl.static_range(0, n_bytes, GROUPS * 32):
        at_k = k + tl.arange(0, GROUPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        xv = tl.load(x + at_k, mask=at_k < n_bytes, other=0.0).to(tl.float32)[None, :, :]
        x_high = xv
        if FOUR:
            x_high = tl.load(x + n_bytes + at_k, mask=at_k < n_bytes, other=0.0).to(tl.float32)[None, :, :]
        w = row_bytes(weight, rows_w, real, k, n_bytes, GROUPS)
        acc = add_row(acc, w, xv, x_high, scales, rows_w, real, k, n_bytes, FOUR, GROUPS)
    y = tl.sum(tl.sum(acc, 2), 1)
    if not FOUR:
        y *= tl.load(scales + rows_w, mask=real, other=0.0).to(tl.float32)
    return y


@triton.jit
def _one_row_up(
    x,
    weight,
    scales,
    out,
    ids,
    n_out,
    WIDTH: tl.constexpr,
    FOUR: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = at_n < n_out
    kind = out.dtype.element_ty
    wait_for_inputs(EARLY)
    rows_w = tl.load(ids + tl.program_id(1)).to(tl.int64) * 2 * n_out + at_n
    gate = _products(x, weight, scales, rows_w, real, WIDTH, FOUR, BLOCK_N, GROUPS)
    up = _products(x, weight, scales, rows_w + n_out, real, WIDTH, FOUR, BLOCK_N, GROUPS)
    y = activate(gate.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    tl.store(out + tl.program_id(1) * n_out + at_n, y.to(kind), mask=real)


@triton.jit
def _one_row_down(
    x,
    weight,
    scales,
    out,
    ids,
    weights,
    n_out,
    WIDTH: tl.constexpr,
    FOUR: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = at_n < n_out
    kind = out.dtype.element_ty
    whole = tl.zeros([BLOCK_N], tl.float32)
    wait_for_inputs(EARLY)
    for i in range(TOP):
        rows_w = tl.load(ids + i).to(tl.int64) * n_out + at_n
        y = _products(x + i * WIDTH, weight, scales, rows_w, real, WIDTH, FOUR, BLOCK_N, GROUPS)
        whole += y.to(kind).to(tl.float32) * tl.load(weights + i)
    tl.store(out + at_n, whole.to(kind), mask=real)


def one_row_of_small_experts(
    x: Tensor, gate_up: Integers, down: Integers, ids: Tensor, weights: Tensor, inner: Tensor, out: Tensor,
    activation: Activation,
) -> None:  # fmt: skip
    """As experts.one_row_of_experts."""
    (n_inner, width), top = (down.shape[1], x.shape[1]), ids.shape[1]
    early, block_n, four = starts_early(1), 2, gate_up.stored.dtype == torch.uint8
    shared = dict(FOUR=four, BLOCK_N=block_n, EARLY=early, launch_pdl=early, num_warps=4)
    _one_row_up[(triton.cdiv(n_inner, block_n), top)](
        x, gate_up.stored, gate_up.scales, inner, ids, n_inner,
        WIDTH=width, GELU=activation == "gelu_tanh", GROUPS=_groups_of(gate_up), **shared,
    )  # fmt: skip
    _one_row_down[(triton.cdiv(width, block_n),)](
        inner, down.stored, down.scales, out, ids, weights, width,
        WIDTH=n_inner, TOP=top, GROUPS=_groups_of(down), **shared,
    )  # fmt: skip


def _groups_of(weight: Integers) -> int:
    """Of 32 bytes, that a program takes at a time."""
    return int(min(32, triton.next_power_of_2(weight.stored.shape[-1] // 32)))
