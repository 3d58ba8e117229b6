"""One pass of rows through decoder layers, into buffers made beforehand: nothing is allocated, so a graph may hold it.

Products of few rows take our kernel where it is faster than cuBLAS (benchmarks/gpu_kernels.py has the figures), all
others cuBLAS; with `fixed` all take one kernel of fixed tiles, so that a row's bits do not depend on the other rows.
How rows attend is given: decode and prefill differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve_app.engine.block import Block, Linear, Norm
from serve_app.engine.gpu.kernels.activation import gate
from serve_app.engine.gpu.kernels.fixed_product import fixed_product
from serve_app.engine.gpu.kernels.norm import rms_norm
from serve_app.engine.gpu.kernels.rope import rotate_and_write
from serve_app.engine.gpu.kernels.skinny_product import MAX_ROWS, skinny_product

Attend = Callable[[Block, Tensor, Tensor, Tensor, Tensor], None]  # block, q, keys, values, out [rows, heads, dim]


class Space:
    """Buffers for up to `rows` rows of one range of layers."""

    def __init__(
        self, rows: int, blocks: Sequence[Block], hidden: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        def buffer(width: int) -> Tensor:
            return torch.zeros((rows, width), device=device, dtype=dtype)

        self.rows = rows
        self.residual, self.x, self.y = buffer(hidden), buffer(hidden), buffer(hidden)
        self.qkv = buffer(max(len(b.qkv.weight) for b in blocks))
        self.q = buffer(max(b.heads * b.dim for b in blocks))
        self.attended = buffer(max(b.heads * b.dim for b in blocks))
        self.gate_up = buffer(max(len(b.gate_up.weight) for b in blocks))
        self.gated = buffer(max(len(b.gate_up.weight) // 2 for b in blocks))


def part(buffer: Tensor, rows: int, width: int) -> Tensor:
    """[rows, width], contiguous, at the start of a buffer."""
    return buffer.view(-1)[: rows * width].view(rows, width)


class Pages:
    """Keys and values of each layer [pages, kv_heads, page, dim], and what says whose they are."""

    def __init__(
        self, blocks: Sequence[Block], n_pages: int, page_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Zeros: a page's unused positions are read with weight 0, and 0 times what is not a number is not 0.
        self.layers = [
            torch.zeros((2, n_pages, b.kv_heads, page_size, b.dim), device=device, dtype=dtype) for b in blocks
        ]


def run_layers(
    blocks: Sequence[Block],
    pages: Pages,
    space: Space,
    rows: int,
    *,
    page_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    attend: Attend,
    final: Norm | None,
    fixed: bool = False,
) -> None:
    """space.residual[:rows] goes in and comes out; with `final`, its norm is left in space.x[:rows]."""
    hidden = space.residual.shape[1]
    residual, x, y = space.residual[:rows], space.x[:rows], space.y[:rows]
    norm(residual, blocks[0].norm_in, x)
    for i, block in enumerate(blocks):
        keys, values = pages.layers[i]
        width = block.heads * block.dim
        qkv = part(space.qkv, rows, len(block.qkv.weight))
        q, attended = part(space.q, rows, width), part(space.attended, rows, width)
        product(x, block.qkv, qkv, fixed)
        rotate_and_write(
            qkv,
            q.view(rows, block.heads, block.dim),
            keys,
            values,
            block.cos,
            block.sin,
            page_table,
            slots,
            positions,
            q_weight=block.q_norm.weight if block.q_norm else None,
            k_weight=block.k_norm.weight if block.k_norm else None,
            eps=block.q_norm.eps if block.q_norm else 0.0,
            gemma=block.q_norm.offset if block.q_norm else False,
            fixed=fixed,
        )
        shape = (rows, block.heads, block.dim)
        attend(block, q.view(shape), keys, values, attended.view(shape))
        product(attended, block.out, y, fixed)
        if block.after_attention is not None:
            norm(y, block.after_attention, y)
        norm(y, block.norm_mid, x, residual)
        gated = part(space.gated, rows, len(block.gate_up.weight) // 2)
        gated_product(x, block, part(space.gate_up, rows, len(block.gate_up.weight)), gated, fixed)
        product(gated, block.down, y, fixed)
        if block.after_mlp is not None:
            norm(y, block.after_mlp, y)
        following = blocks[i + 1].norm_in if i + 1 < len(blocks) else final
        if following is not None:
            norm(y, following, x, residual)
        else:
            torch.add(residual, y, out=residual)
    assert hidden == x.shape[1]


def norm(x: Tensor, of: Norm, out: Tensor, residual: Tensor | None = None) -> None:
    """out = norm(x); with residual: residual += x, out = norm(residual)."""
    rms_norm(x, of.weight, of.eps, out, residual, gemma=of.offset)


def product(x: Tensor, linear: Linear, out: Tensor, fixed: bool = False) -> None:
    """out = x @ weight.T + bias."""
    rows, (n_out, width) = len(x), linear.weight.shape
    if fixed:
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


def head_product(x: Tensor, weight: Tensor, out: Tensor, fixed: bool = False) -> None:
    """out = x @ weight.T for a weight with very many rows."""
    rows, width = len(x), weight.shape[1]
    if fixed:
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
    if fixed:
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


def _one_row_block(width: int) -> int:
    return 2048 if width >= 2048 else 1024


def _long(n_out: int, width: int) -> bool:
    """Far more to sum than to give, as in an MLP's way down: cuBLAS then leaves most of the machine idle."""
    return width >= 3 * n_out


def _on_matrix_units(x: Tensor) -> bool:
    return x.dtype != torch.float32  # which they would round to tf32
