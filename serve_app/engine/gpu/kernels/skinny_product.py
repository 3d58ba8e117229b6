"""Products of a few rows with a weight matrix: bound by reading the weights, which cuBLAS does below memory speed.

Equals x @ weight.T, accumulated in float32. One row is multiplied on the ordinary cores; up to MAX_ROWS stand as one
tile of the matrix units. With `gated` the weight holds gate rows, then up rows, and out = act(gate) * up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.block import Activation
from serve_app.engine.gpu.kernels.activation import activate
from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs

MAX_ROWS = 64


@triton.jit
def _one_row(
    x,
    weight,
    out,
    bias,
    residual,
    n_out,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    real = at_n < n_out
    rows = weight + at_n[:, None].to(tl.int64) * WIDTH
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_rows = rows
    if GATED:
        up_rows = rows + n_out.to(tl.int64) * WIDTH
    # The first weights are on their way before the row they are multiplied with is there.
    both = real[:, None] & (offs_k < WIDTH)[None, :]
    w = tl.load(rows + offs_k[None, :], mask=both, other=0.0)
    w_up = w
    if GATED:
        w_up = tl.load(up_rows + offs_k[None, :], mask=both, other=0.0)
    wait_for_inputs(EARLY)
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        at_k = k + offs_k
        inside = at_k < WIDTH
        if k > 0:
            both = real[:, None] & inside[None, :]
            w = tl.load(rows + at_k[None, :], mask=both, other=0.0)
            if GATED:
                w_up = tl.load(up_rows + at_k[None, :], mask=both, other=0.0)
        xv = tl.load(x + at_k, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc += w.to(tl.float32) * xv
        if GATED:
            acc_up += w_up.to(tl.float32) * xv
    y = tl.sum(acc, 1)
    kind = out.dtype.element_ty
    if HAS_BIAS:
        y += tl.load(bias + at_n, mask=real, other=0.0).to(tl.float32)
    if GATED:
        up_y = tl.sum(acc_up, 1).to(kind).to(tl.float32)
        y = activate(y.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * up_y
    if HAS_RESIDUAL:
        y = y.to(kind).to(tl.float32) + tl.load(residual + at_n, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at_n, y.to(kind), mask=real)


@triton.jit(do_not_specialize=["n_rows"])
def _few_rows(
    x,
    weight,
    out,
    bias,
    residual,
    n_rows,
    n_out,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    real_n = at_n < n_out
    real_m = at_m < n_rows
    w_at = weight + at_n[None, :].to(tl.int64) * WIDTH
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        at_k = k + offs_k
        inside = at_k < WIDTH
        xv = tl.load(x + at_m[:, None] * WIDTH + at_k[None, :], mask=real_m[:, None] & inside[None, :], other=0.0)
        both = real_n[None, :] & inside[:, None]
        acc += tl.dot(xv, tl.load(w_at + at_k[:, None], mask=both, other=0.0), input_precision="ieee")
        if GATED:
            up = w_at + n_out.to(tl.int64) * WIDTH
            acc_up += tl.dot(xv, tl.load(up + at_k[:, None], mask=both, other=0.0), input_precision="ieee")
    kind = out.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias + at_n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = activate(acc.to(kind).to(tl.float32), GELU).to(kind).to(tl.float32) * acc_up.to(kind).to(tl.float32)
    at = at_m[:, None] * n_out + at_n[None, :]
    real = real_m[:, None] & real_n[None, :]
    if HAS_RESIDUAL:
        acc = acc.to(kind).to(tl.float32) + tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(kind), mask=real)


def skinny_product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    activation: Activation = "silu",
    block_n: int = 16,
    block_k: int = 512,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """x [rows, width], weight [n, width] -> out [rows, n] (gated: [rows, n / 2]); rows at most MAX_ROWS.

    residual [rows, n]: added to the rounded product; may be out itself. bias [n], not with gated.
    """
    rows, width = x.shape
    assert rows <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous()
    n_out = len(weight) // 2 if gated else len(weight)
    shared = dict(
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GATED=gated,
        GELU=activation == "gelu_tanh",
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps,
        num_stages=stages,
    )
    grid = (triton.cdiv(n_out, block_n),)
    if rows == 1:
        early = starts_early(rows)
        _one_row[grid](x, weight, out, bias, residual, n_out, EARLY=early, launch_pdl=early, **shared)
    else:
        pad = max(16, triton.next_power_of_2(rows))
        _few_rows[grid](x, weight, out, bias, residual, rows, n_out, BLOCK_M=pad, **shared)
