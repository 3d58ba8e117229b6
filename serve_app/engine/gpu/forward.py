"""One pass of rows through decoder layers, into buffers made beforehand: nothing is allocated, so a graph may hold it.

Which kernel takes a product is in products.py. How rows attend is given: decode and prefill differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.engine.block import Block, Norm
from serve_app.engine.gpu.experts import ExpertSpace, experts_product
from serve_app.engine.gpu.kernels.norm import rms_norm
from serve_app.engine.gpu.kernels.rope import rotate_and_write
from serve_app.engine.gpu.products import gated_product, product


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values of one layer [pages, kv_heads, page, dim].

    scales [2, pages, kv_heads, page] float32, of keys and of values, where these are 8-bit floats.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor | None


Attend = Callable[[Block, Tensor, Kept, Tensor], None]  # block, q, kept, out; q and out [rows, heads, dim]


class Space:
    """Buffers for up to `rows` rows of one range of layers."""

    def __init__(
        self, rows: int, blocks: Sequence[Block], hidden: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        def buffer(width: int) -> Tensor:
            return torch.zeros((rows, width), device=device, dtype=dtype)

        self.rows = rows
        self.residual, self.x, self.y = buffer(hidden), buffer(hidden), buffer(hidden)
        self.qkv = buffer(max(b.qkv.n_out for b in blocks))
        self.q = buffer(max(b.heads * b.dim for b in blocks))
        self.attended = buffer(max(b.heads * b.dim for b in blocks))
        wide = max((b.gate_up.n_out for b in blocks if b.router is None), default=0)
        self.gate_up, self.gated = buffer(wide), buffer(wide // 2)
        self.experts = ExpertSpace(rows, blocks, hidden, device, dtype)


def part(buffer: Tensor, rows: int, width: int) -> Tensor:
    """[rows, width], contiguous, at the start of a buffer."""
    return buffer.view(-1)[: rows * width].view(rows, width)


class Pages:
    """Keys and values of each layer."""

    def __init__(
        self, blocks: Sequence[Block], n_pages: int, page_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Zeros: a page's unused positions are read with weight 0, and 0 times what is not a number is not 0.
        self.layers: list[Kept] = []
        for b in blocks:
            shape = (2, n_pages, b.kv_heads, page_size)
            both, scales = torch.zeros((*shape, b.dim * dtype.itemsize), device=device, dtype=torch.uint8), None
            if dtype == torch.float8_e4m3fn:
                scales = torch.zeros(shape, device=device)
            keys, values = both.view(dtype)
            self.layers.append(Kept(keys, values, scales))


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
        kept = pages.layers[i]
        width = block.heads * block.dim
        qkv = part(space.qkv, rows, block.qkv.n_out)
        q, attended = part(space.q, rows, width), part(space.attended, rows, width)
        product(x, block.qkv, qkv, fixed)
        rotate_and_write(
            qkv,
            q.view(rows, block.heads, block.dim),
            kept.keys,
            kept.values,
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
            scales=kept.scales,
        )
        shape = (rows, block.heads, block.dim)
        attend(block, q.view(shape), kept, attended.view(shape))
        product(attended, block.out, y, fixed)
        if block.after_attention is not None:
            norm(y, block.after_attention, y)
        norm(y, block.norm_mid, x, residual)
        if block.router is not None:
            experts_product(x, block, space.experts, y, fixed)
        else:
            gated = part(space.gated, rows, block.gate_up.n_out // 2)
            gated_product(x, block, part(space.gate_up, rows, block.gate_up.n_out), gated, fixed)
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
