"""Which kernel takes a product of rows with a weight, by the number of rows.

Products of few rows take our kernel where it is faster than cuBLAS (benchmarks/gpu_kernels.py has the figures), all
others cuBLAS; with `fixed` all take one kernel of fixed tiles, so that a row's bits do not depend on the other rows.
Weights of small integers have kernels of their own; of very many rows cuBLAS is faster even with a widened copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.block import Activation, Block, Integers, Linear
from serve_app.engine.gpu.kernels.activation import gate
from serve_app.engine.gpu.kernels.fixed_product import fixed_product
from serve_app.engine.gpu.kernels.quantised_product import look_up, quantised_product, widen
from serve_app.engine.gpu.kernels.skinny_product import MAX_ROWS, skinny_product

WIDENED_FROM = 512  # rows: a widened copy of the weight is then a small part of what is moved


def product(x: Tensor, linear: Linear, out: Tensor, fixed: bool = False) -> None:
    """out = x @ weight.T + bias."""
    rows, (n_out, width) = len(x), linear.shape
    if linear.integers is not None:
        _quantised(x, linear.integers, out, fixed, bias=linear.bias)
    elif fixed:
        fixed_product(x, linear.weight, out, linear.bias)
    elif rows == 1:
        skinny_product(
            x, linear.weight, out, bias=linear.bias, block_n=2, block_k=_one_row_block(width), warps=4, stages=2
        )
    elif 1 < rows <= MAX_ROWS and _long(n_out, width) and linear.bias is None and _on_matrix_units(x):
        skinny_product(x, linear.weight, out, block_n=16, block_k=256, warps=4, stages=4)
    elif linear.bias is not None:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)
    else:
        torch.mm(x, linear.weight.t(), out=out)


def head_product(x: Tensor, head: Linear, out: Tensor, fixed: bool = False) -> None:
    """out = x @ weight.T for a weight with very many rows."""
    rows, weight, width = len(x), head.weight, head.shape[1]
    if head.integers is not None:
        _quantised(x, head.integers, out, fixed)
    elif fixed:
        fixed_product(x, weight, out)
    elif rows == 1:
        skinny_product(x, weight, out, block_n=2, block_k=_one_row_block(width), warps=4, stages=2)
    elif rows <= MAX_ROWS and _on_matrix_units(x):
        skinny_product(x, weight, out, block_n=64, block_k=128, warps=4, stages=4)
    else:
        torch.mm(x, weight.t(), out=out)


def gated_product(x: Tensor, block: Block, both: Tensor, out: Tensor, fixed: bool = False) -> None:
    """out = act(x @ gate.T) * (x @ up.T)."""
    rows, linear = len(x), block.gate_up
    if linear.integers is not None and linear.bias is None and not _is_widened(x, fixed):
        _quantised(x, linear.integers, out, fixed, gated=True, activation=block.activation)
    elif linear.integers is not None:
        product(x, linear, both)
        gate(both, out, block.activation)
    elif fixed:
        fixed_product(x, linear.weight, both, linear.bias)
        gate(both, out, block.activation)
    elif rows == 1 and linear.bias is None:
        width = _one_row_block(linear.weight.shape[1])
        skinny_product(
            x, linear.weight, out, gated=True, activation=block.activation, block_n=2, block_k=width, warps=4, stages=2
        )
    elif rows <= MAX_ROWS and linear.bias is None and _on_matrix_units(x):
        skinny_product(
            x, linear.weight, out, gated=True, activation=block.activation, block_n=64, block_k=128, warps=4, stages=4
        )
    else:
        product(x, linear, both)
        gate(both, out, block.activation)


def embed(ids: Tensor, table: Linear, scale: float, out: Tensor) -> None:
    """out [rows, hidden] = the rows `ids` of the table, times the scale."""
    if table.integers is not None:
        look_up(ids, table.integers, out)
    else:
        torch.index_select(table.weight, 0, ids, out=out)
    if scale != 1.0:
        out.mul_(scale)


def _quantised(
    x: Tensor,
    weight: Integers,
    out: Tensor,
    fixed: bool,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: Activation = "silu",
) -> None:
    rows, (n_out, width), four = len(x), weight.shape, weight.stored.dtype == torch.uint8
    if _is_widened(x, fixed):
        assert not gated
        _widened(x, weight, out, bias)
        return
    if fixed:
        shape = dict(block_m=64, block_n=64, block_k=64, warps=4, stages=3)
    elif rows == 1:
        shape = dict(block_m=1, block_n=2, block_k=1024 if width >= 2048 else 512, warps=4, stages=2)
    elif rows <= 16:
        shape = dict(block_m=16, block_n=64 if four or n_out > 8192 else 32, block_k=128, warps=4, stages=4)
    elif rows <= 64:
        # More four-bit inputs at a time do not fit into registers.
        shape = dict(block_m=32 if rows <= 32 else 64, block_n=64, block_k=64 if four else 128, warps=4, stages=4)
    else:
        shape = dict(block_m=128, block_n=64 if gated else 128, block_k=64, warps=8, stages=3)
    quantised_product(x, weight, out, bias=bias, gated=gated, activation=activation, **shape)


def _is_widened(x: Tensor, fixed: bool) -> bool:
    """Not in float16, where sums of integers that are not scaled yet could be infinite."""
    return len(x) >= WIDENED_FROM and not fixed and x.dtype != torch.float16


def _widened(x: Tensor, weight: Integers, out: Tensor, bias: Tensor | None) -> None:
    """The product by cuBLAS with a copy of the weight; int8 rows are scaled afterwards, as everywhere."""
    wide = torch.empty(weight.shape, device=x.device, dtype=x.dtype)
    widen(weight, wide)
    torch.mm(x, wide.t(), out=out)
    if weight.stored.dtype != torch.uint8:
        out.mul_(weight.scales[:, 0])
    if bias is not None:
        out.add_(bias)


def _one_row_block(width: int) -> int:
    return 2048 if width >= 2048 else 1024


def _long(n_out: int, width: int) -> bool:
    """Far more to sum than to give, as in an MLP's way down: cuBLAS then leaves most of the machine idle."""
    return width >= 3 * n_out


def _on_matrix_units(x: Tensor) -> bool:
    return x.dtype != torch.float32  # which they would round to tf32
