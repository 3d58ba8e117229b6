"""Which experts each row goes to, and the pairs of row and expert in the order of the experts: all on the device.

A pair is a row's number times TOP plus the place of the expert among the row's. Sizes depend on the number of rows
alone, never on where they go, so that a CUDA graph may hold it all; the order within an expert is that of the pairs.
Source: Shazeer et al. 2017, "Outrageously large neural networks", as transformers computes it: softmax in float32 over
all experts, then the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs

N_TILE = 3  # numbers of a tile: expert, place of its first pair in the order, pairs


def pairs_at_a_time(n_experts: int) -> int:
    """How many pairs one program sorts: with all experts side by side they must fit into registers."""
    return int(max(16, min(128, 16384 // triton.next_power_of_2(n_experts))))


def most_tiles(n_pairs: int, n_experts: int, tile: int) -> int:
    """How many tiles of so many pairs of one expert there can be."""
    return n_pairs // tile + min(n_pairs, n_experts)


@triton.jit
def _route(
    logits,
    ids,
    weights,
    N_EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    TOP: tl.constexpr,
    TOP_PAD: tl.constexpr,
    NORMALISED: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    offs = tl.arange(0, TOP_PAD)
    wait_for_inputs(EARLY)
    x = tl.load(logits + row * N_EXPERTS + at, mask=at < N_EXPERTS, other=float("-inf")).to(tl.float32)
    share = tl.exp(x - tl.max(x, 0))
    share = share / tl.sum(share, 0)
    chosen = tl.zeros([TOP_PAD], tl.float32)
    which = tl.zeros([TOP_PAD], tl.int32)
    for k in tl.static_range(TOP):
        best = tl.max(share, 0)
        # Where no share is a number none equals the best; the expert must exist all the same.
        expert = tl.minimum(tl.min(tl.where(share == best, at, PAD), 0), N_EXPERTS - 1)
        chosen = tl.where(offs == k, best, chosen)
        which = tl.where(offs == k, expert, which)
        share = tl.where(at == expert, -1.0, share)
    if NORMALISED:
        chosen = chosen / tl.sum(chosen, 0)
    if ROUNDED:
        chosen = chosen.to(logits.dtype.element_ty).to(tl.float32)
    tl.store(ids + row * TOP + offs, which, mask=offs < TOP)
    tl.store(weights + row * TOP + offs, chosen, mask=offs < TOP)


@triton.jit(do_not_specialize=["n_pairs"])
def _count(ids, counts, n_pairs, PAIRS: tl.constexpr, PAD: tl.constexpr):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(ids + pair, mask=pair < n_pairs, other=PAD)
    goes = (expert[:, None] == tl.arange(0, PAD)[None, :]).to(tl.int32)
    tl.store(counts + tl.program_id(0) * PAD + tl.arange(0, PAD), tl.sum(goes, 0))


@triton.jit(do_not_specialize=["n_pairs", "n_programs", "n_tiles"])
def _place(
    ids,
    counts,
    order,
    tiles,
    n_pairs,
    n_programs,
    n_tiles,
    PAIRS: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    me = tl.program_id(0)
    experts = tl.arange(0, PAD)
    offs_p = tl.arange(0, 16)
    total = tl.zeros([PAD], tl.int32)
    before = tl.zeros([PAD], tl.int32)
    for p in range(0, n_programs, 16):
        at = p + offs_p
        found = tl.load(counts + at[:, None] * PAD + experts[None, :], mask=(at < n_programs)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((at < me)[:, None], found, 0), 0)
    first = tl.cumsum(total, 0) - total

    pair = me * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(ids + pair, mask=pair < n_pairs, other=PAD)
    goes = (expert[:, None] == experts[None, :]).to(tl.int32)
    rank = tl.cumsum(goes, 0) - 1 + (first + before)[None, :]
    tl.store(order + tl.sum(goes * rank, 1), pair, mask=pair < n_pairs)

    of_expert = (total + TILE - 1) // TILE
    last = tl.cumsum(of_expert, 0)
    for t in range(me * PAIRS, n_tiles, n_programs * PAIRS):
        tile = t + tl.arange(0, PAIRS)
        owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
        mine = owner[:, None] == experts[None, :]
        skipped = (tile[:, None] - (last - of_expert)[None, :]) * TILE
        begin = tl.sum(tl.where(mine, first[None, :] + skipped, 0), 1)
        n = tl.minimum(tl.sum(tl.where(mine, total[None, :] - skipped, 0), 1), TILE)
        real = tile < n_tiles
        tl.store(tiles + tile * 3, owner, mask=real)
        tl.store(tiles + tile * 3 + 1, begin, mask=real)
        tl.store(tiles + tile * 3 + 2, n, mask=real)


def route(logits: Tensor, ids: Tensor, weights: Tensor, *, normalised: bool, rounded: bool) -> None:
    """logits [rows, experts] -> ids [rows, top] int32, weights [rows, top] float32, the largest first.

    normalised: weights add up to one. rounded: to the dtype of the logits.
    """
    rows, n_experts = logits.shape
    top, early = ids.shape[1], starts_early(rows)
    _route[(rows,)](
        logits,
        ids,
        weights,
        N_EXPERTS=n_experts,
        PAD=triton.next_power_of_2(n_experts),
        TOP=top,
        TOP_PAD=triton.next_power_of_2(top),
        NORMALISED=normalised,
        ROUNDED=rounded,
        num_warps=1,
        EARLY=early,
        launch_pdl=early,
    )


def sort_pairs(ids: Tensor, n_experts: int, tile: int, *, counts: Tensor, order: Tensor, tiles: Tensor) -> None:
    """order [pairs]: the pairs by expert; tiles [most_tiles, 3]: what a product takes at a time; past the last, none.

    ids [rows, top]; counts: work space of cdiv(pairs, pairs_at_a_time) times the experts' next power of two; int32.
    """
    n_pairs, pad, block = ids.numel(), triton.next_power_of_2(n_experts), pairs_at_a_time(n_experts)
    n_programs, n_tiles = triton.cdiv(n_pairs, block), most_tiles(n_pairs, n_experts, tile)
    assert counts.numel() >= n_programs * pad and order.numel() >= n_pairs and tiles.numel() >= N_TILE * n_tiles
    _count[(n_programs,)](ids, counts, n_pairs, PAIRS=block, PAD=pad, num_warps=8)
    _place[(n_programs,)](
        ids, counts, order, tiles, n_pairs, n_programs, n_tiles, PAIRS=block, PAD=pad, TILE=tile, num_warps=8
    )
