"""Products in tiles of one shape, whatever the number of rows: so a row's bits do not depend on the rows beside it.

Equals x @ weight.T + bias, accumulated in float32. Libraries choose tiles, and with them the order of summation, by the
number of rows; here every element is summed over blocks of BLOCK_K inputs in the same order by the same instruction.
Source: He et al. 2025, "Defeating nondeterminism in LLM inference" (Thinking Machines), batch-invariant kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64


@triton.jit(do_not_specialize=["n_rows"])
def _product(
    x,
    weight,
    out,
    bias,
    n_rows,
    n_out,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    at_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    real_m = at_m < n_rows
    real_n = at_n < n_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        at_k = k + offs_k
        inside = at_k < WIDTH
        xv = tl.load(x + at_m[:, None] * WIDTH + at_k[None, :], mask=real_m[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + at_n[None, :] * WIDTH + at_k[:, None], mask=real_n[None, :] & inside[:, None], other=0.0)
        acc += tl.dot(xv, w, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + at_n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    at = at_m[:, None] * n_out + at_n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real_m[:, None] & real_n[None, :])


def fixed_product(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """x [rows, width], weight [n, width], bias [n] -> out [rows, n]."""
    rows, width = x.shape
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    _product[(triton.cdiv(len(weight), BLOCK_N), triton.cdiv(rows, BLOCK_M))](
        x,
        weight,
        out,
        bias,
        rows,
        len(weight),
        WIDTH=width,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        HAS_BIAS=bias is not None,
        num_warps=4,
        num_stages=3,
    )
