"""The MLP of a layer with experts: routed, sorted, multiplied and added up on the device, nothing waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from serve_app.engine.block import Block
from serve_app.engine.gpu.kernels.experts import add_up, grouped_product, one_row_of_experts
from serve_app.engine.gpu.kernels.quantised_experts import one_row_of_small_experts
from serve_app.engine.gpu.kernels.route import N_TILE, most_tiles, pairs_at_a_time, route, sort_pairs
from serve_app.engine.gpu.products import product

_SMALLEST_TILE, _FIXED_TILE = 16, 64


class ExpertSpace:
    """Work space for up to `rows` rows of the layers with experts; empty without any."""

    def __init__(
        self, rows: int, blocks: Sequence[Block], hidden: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        mixed = [(b, b.router) for b in blocks if b.router is not None]
        experts = max((r.n_experts for _, r in mixed), default=0)
        pairs = rows * max((r.top for _, r in mixed), default=0)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.logits = torch.zeros(rows * experts, dtype=dtype, device=device)
        self.ids, self.order = ints(pairs), ints(pairs)
        self.weights = torch.zeros(pairs, dtype=torch.float32, device=device)
        programs = max((-(-pairs // pairs_at_a_time(r.n_experts)) for _, r in mixed), default=0)
        self.counts = ints(programs * triton.next_power_of_2(max(experts, 1)))
        self.tiles = ints(most_tiles(pairs, experts, _SMALLEST_TILE) * N_TILE)
        inner = max((b.gate_up.n_out // 2 for b, _ in mixed), default=0)
        self.inner = torch.zeros(pairs * inner, dtype=dtype, device=device)
        self.parts = torch.zeros(pairs * hidden, dtype=dtype, device=device)


def experts_product(x: Tensor, block: Block, space: ExpertSpace, out: Tensor, fixed: bool = False) -> None:
    """out [rows, hidden] = the mixture of what the experts of each row of x make of it."""
    router, (rows, hidden) = block.router, x.shape
    assert router is not None
    gate_up, down, top = block.gate_up, block.down, router.top
    pairs, n_inner = rows * top, gate_up.n_out // 2
    logits = space.logits[: rows * router.n_experts].view(rows, router.n_experts)
    ids, weights = (t[:pairs].view(rows, top) for t in (space.ids, space.weights))
    inner, parts = (
        space.inner[: pairs * n_inner].view(pairs, n_inner),
        space.parts[: pairs * hidden].view(pairs, hidden),
    )
    product(x, router.linear, logits, fixed)
    route(logits, ids, weights, normalised=router.normalised, rounded=router.rounded)
    if rows == 1 and not fixed:
        if gate_up.integers is not None and down.integers is not None:
            small = gate_up.integers, down.integers
            one_row_of_small_experts(x, *small, ids, weights, inner, out, block.activation)
        else:
            one_row_of_experts(x, gate_up.weight, down.weight, ids, weights, inner, out, block.activation)
        return
    tile = _FIXED_TILE if fixed else _tile_of(pairs / router.n_experts)
    warps, block_k = (8 if tile == 128 else 4), 64 if tile >= 64 else 128
    sort_pairs(ids, router.n_experts, tile, counts=space.counts, order=space.order, tiles=space.tiles)
    n_tiles = most_tiles(pairs, router.n_experts, tile)
    for source, weight, to, gated in ((x, gate_up, inner, True), (inner, down, parts, False)):
        grouped_product(
            source, weight, to, space.order, space.tiles, n_tiles, top, gated=gated, activation=block.activation,
            block_m=tile, block_n=64 if gated or tile < 64 else 128, block_k=block_k, warps=warps, stages=3,
        )  # fmt: skip
    add_up(parts, weights, out)


def _tile_of(pairs_of_expert: float) -> int:
    """Rows of a tile, by how many an expert has on average: what is not filled is computed for nothing."""
    return next((tile for tile in (_SMALLEST_TILE, 32, 64) if pairs_of_expert <= tile), 128)
