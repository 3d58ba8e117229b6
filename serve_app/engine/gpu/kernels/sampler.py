"""Draws one token per row from its logits by engine/sampler.py's rule, without the host waiting.

Three launches. Rows with top-k, top-p or min-p first find the boundary of what they leave: bisection over the logits'
bit patterns, no sort. Then every block of the vocabulary finds its best score in float32. The last launch looks again,
in float64, at the tokens whose float32 score is so near the best that rounding could have changed the order;
so the token is that of the float64 rule, whatever the block size or batch.
A row with penalties or biases is drawn from logits of its own (penalties.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.logit_row import find_own, from_order, load_row, order_of
from serve_app.engine.gpu.kernels.noise import gumbel32, noise_bits
from serve_app.engine.gpu.kernels.penalties import N_CONTROLS

_BLOCK = 4096  # of the vocabulary, for one program of the second launch
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _find_boundary(
    logits,
    slots,
    temperature_micro,
    top_k,
    top_p_micro,
    boundary,
    min_p_log,
    controls,
    own_at,
    n_vocab,
    CHUNK: tl.constexpr,
    CONTROLS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """boundary[row] = (key, id): allowed are keys above it, and equal keys of ids up to it."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    k = tl.load(top_k + slot, mask=slot >= 0, other=0)
    p_micro = tl.load(top_p_micro + slot, mask=slot >= 0, other=1000000)
    t_micro = tl.load(temperature_micro + slot, mask=slot >= 0, other=0)
    tl.store(boundary + row * 2, _LOWEST)
    tl.store(boundary + row * 2 + 1, n_vocab)
    base = logits + row.to(tl.int64) * n_vocab
    lowest_log = tl.full([], 1.0, tl.float64)  # above 0: no min-p
    has_own, own_row = 0, base
    if CONTROLS:
        lowest_log = tl.load(min_p_log + slot, mask=slot >= 0, other=1.0)
        has_own, own_row = find_own(controls, own_at, slot, row.to(tl.int64) * n_vocab, FIELDS)
    if (slot < 0) | (t_micro == 0) | ((k == 0) & (p_micro == 1000000) & (lowest_log > 0)):
        return
    offs = tl.arange(0, CHUNK)
    key = tl.full([], _LOWEST, tl.int32)
    quota = n_vocab  # how many tokens of the boundary's own key are allowed
    if (k > 0) & (k < n_vocab):
        low = tl.full([], _LOWEST, tl.int64)  # count(key >= low) >= k always
        high = tl.full([], 2147483647, tl.int64)  # count(key >= high) < k: no finite logit has this key
        while high - low > 1:
            middle = (low + high) // 2
            count = 0
            for n in range(0, n_vocab, CHUNK):
                x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
                count += tl.sum(((order_of(x) >= middle) & (n + offs < n_vocab)).to(tl.int32), 0)
            if count >= k:
                low = middle
            else:
                high = middle
        key = low.to(tl.int32)
        above = 0
        for n in range(0, n_vocab, CHUNK):
            x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
            above += tl.sum(((order_of(x) > key) & (n + offs < n_vocab)).to(tl.int32), 0)
        quota = k - above
    if p_micro < 1000000:
        best = float("-inf")
        for n in range(0, n_vocab, CHUNK):
            x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
            best = tl.maximum(best, tl.max(x, 0))
        sharp = 1e6 / t_micro.to(tl.float32)
        total = tl.full([], 0.0, tl.float64)
        tie = tl.full([], 0.0, tl.float64)  # weight of one token of the boundary's own key
        for n in range(0, n_vocab, CHUNK):
            x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
            weight = tl.where(n + offs < n_vocab, tl.exp((x - best) * sharp), 0.0)
            order = order_of(x)
            total += tl.sum(tl.where(order > key, weight, 0.0), 0).to(tl.float64)
            tie = tl.maximum(tie, tl.max(tl.where(order == key, weight, 0.0), 0).to(tl.float64))
        if key > _LOWEST:
            total += tie * quota.to(tl.float64)
        wanted = total * (p_micro.to(tl.float64) / 1e6)
        low = key.to(tl.int64)  # weight of keys >= low reaches what is wanted
        high = tl.full([], 2147483647, tl.int64)  # that of keys >= high does not
        while high - low > 1:
            middle = (low + high) // 2
            mass = tl.full([], 0.0, tl.float64)
            for n in range(0, n_vocab, CHUNK):
                x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
                inside = (order_of(x) >= middle) & (n + offs < n_vocab)
                mass += tl.sum(tl.where(inside, tl.exp((x - best) * sharp), 0.0), 0).to(tl.float64)
            if mass >= wanted:
                low = middle
            else:
                high = middle
        found = low.to(tl.int32)
        above_mass = tl.full([], 0.0, tl.float64)
        own = tl.full([], 0.0, tl.float64)
        for n in range(0, n_vocab, CHUNK):
            x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
            weight = tl.where(n + offs < n_vocab, tl.exp((x - best) * sharp), 0.0)
            order = order_of(x)
            above_mass += tl.sum(tl.where(order > found, weight, 0.0), 0).to(tl.float64)
            own = tl.maximum(own, tl.max(tl.where(order == found, weight, 0.0), 0).to(tl.float64))
        missing = (wanted - above_mass) / own
        needed = tl.maximum(missing.to(tl.int32) + (missing.to(tl.int32).to(tl.float64) < missing).to(tl.int32), 1)
        quota = tl.where(found == key, tl.minimum(quota, needed), needed)
        key = found
    # Of equal keys the lowest ids count: find the id at which the quota is used up.
    used = 0
    last = -1
    for n in range(0, n_vocab, CHUNK):
        x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
        equal = ((order_of(x) == key) & (n + offs < n_vocab)).to(tl.int32)
        rank = used + tl.cumsum(equal, 0)
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (rank <= quota), n + offs, -1), 0))
        used += tl.sum(equal, 0)
    if lowest_log <= 0:
        best = tl.full([], float("-inf"), tl.float32)
        for n in range(0, n_vocab, CHUNK):
            x = load_row(base, own_row, has_own, n + offs, n + offs < n_vocab, float("-inf"), CONTROLS)
            best = tl.maximum(best, tl.max(x, 0))
        temperature = t_micro.to(tl.float64) / 1e6
        top = best.to(tl.float64) / temperature
        low = tl.full([], _LOWEST, tl.int64)  # too unlikely: this key is no number
        high = order_of(best).to(tl.int64)  # likely enough
        while high - low > 1:
            middle = (low + high) // 2
            if from_order(middle.to(tl.int32)).to(tl.float64) / temperature - top >= lowest_log:
                high = middle
            else:
                low = middle
        if high.to(tl.int32) > key:
            key = high.to(tl.int32)
            last = n_vocab
    tl.store(boundary + row * 2, key)
    tl.store(boundary + row * 2 + 1, last)


@triton.jit
def _score32(x, first_id, allowed, t_micro, position, k0, k1, BLOCK: tl.constexpr):
    """What the float64 rule would score, in float32; greedy rows score their logit."""
    if t_micro == 0:
        score = x
    else:
        score = x * (1e6 / t_micro.to(tl.float32)) + gumbel32(noise_bits(position, first_id, k0, k1, BLOCK))
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def _allowed(x, ids, n_vocab, boundary, row):
    key = tl.load(boundary + row * 2)
    last = tl.load(boundary + row * 2 + 1)
    order = order_of(x)
    return (ids < n_vocab) & ((order > key) | ((order == key) & (ids <= last)) | (key == _LOWEST))


@triton.jit
def _best_of_block(
    logits,
    slots,
    positions,
    temperature_micro,
    keys,
    boundary,
    block_best,
    controls,
    own_at,
    n_vocab,
    n_blocks,
    BLOCK: tl.constexpr,
    CONTROLS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    base = logits + row.to(tl.int64) * n_vocab
    has_own, own_row = 0, base
    if CONTROLS:
        has_own, own_row = find_own(controls, own_at, slot, row.to(tl.int64) * n_vocab, FIELDS)
    x = load_row(base, own_row, has_own, ids, ids < n_vocab, 0.0, CONTROLS)
    broken = tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 0)
    allowed = _allowed(x, ids, n_vocab, boundary, row)
    t_micro = tl.load(temperature_micro + slot)
    k0 = tl.load(keys + slot * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + slot * 2 + 1).to(tl.uint32, bitcast=True)
    position = (tl.load(positions + row) + 1).to(tl.uint32)
    score = _score32(x, block * BLOCK, allowed, t_micro, position, k0, k1, BLOCK)
    best = tl.where(broken > 0, float("inf"), tl.max(score, 0))
    tl.store(block_best + row * n_blocks + block, best)


@triton.jit
def _choose(
    logits,
    slots,
    positions,
    temperature_micro,
    keys,
    boundary,
    block_best,
    tokens,
    last_tokens,
    controls,
    own_at,
    n_vocab,
    n_blocks,
    BLOCK: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    CONTROLS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    at = tl.arange(0, BLOCKS_PAD)
    bests = tl.load(block_best + row * n_blocks + at, mask=at < n_blocks, other=float("-inf"))
    top = tl.max(bests, 0)
    if top == float("inf"):
        tl.store(tokens + row, -1)  # logits that are not finite
        tl.store(last_tokens + slot, 0)
        return
    t_micro = tl.load(temperature_micro + slot)
    k0 = tl.load(keys + slot * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + slot * 2 + 1).to(tl.uint32, bitcast=True)
    position = (tl.load(positions + row) + 1).to(tl.uint32)
    # float32 scores are right to a few units of the scaled logit's last place and to 1e-5 of noise.
    near = tl.where(t_micro == 0, top, top - 1e-3 - 1e-6 * tl.abs(top))
    base = logits + row.to(tl.int64) * n_vocab
    has_own, own_row = 0, base
    if CONTROLS:
        has_own, own_row = find_own(controls, own_at, slot, row.to(tl.int64) * n_vocab, FIELDS)
    best = tl.full([], float("-inf"), tl.float64)
    token = n_vocab
    # Most often one block only: look at none of the others.
    block = tl.min(tl.where(bests >= near, at, n_blocks), 0)
    while block < n_blocks:
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = load_row(base, own_row, has_own, ids, ids < n_vocab, 0.0, CONTROLS)
        allowed = _allowed(x, ids, n_vocab, boundary, row)
        score = _score32(x, block * BLOCK, allowed, t_micro, position, k0, k1, BLOCK)
        chosen = allowed & (score >= near)
        exact = x.to(tl.float64)
        if t_micro != 0:
            bits = noise_bits(position, block * BLOCK, k0, k1, BLOCK)
            u = (bits.to(tl.float64) + 0.5) / 4294967296.0
            exact = exact / (t_micro.to(tl.float64) / 1e6) - tl.log(-tl.log(u))
        exact = tl.where(chosen, exact, float("-inf"))
        here = tl.max(exact, 0)
        first = tl.min(tl.where(exact == here, ids, n_vocab), 0)
        if here > best:  # an equal one of a later block has a higher id
            best = here
            token = first
        block = tl.min(tl.where((bests >= near) & (at > block), at, n_blocks), 0)
    tl.store(tokens + row, token)
    tl.store(last_tokens + slot, token)


class SamplerSpace:
    """Work space of one batch size: nothing is allocated while a graph replays."""

    def __init__(self, rows: int, n_vocab: int, device: torch.device) -> None:
        self.n_blocks = triton.cdiv(n_vocab, _BLOCK)
        self.boundary = torch.empty((rows, 2), dtype=torch.int32, device=device)
        self.block_best = torch.empty((rows, self.n_blocks), dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class Controlled:
    """What some slots draw by besides. Tensors by slot, but own_at: see penalties.apply_penalties."""

    controls: Tensor  # [slots, N_CONTROLS] int32
    min_p_log: Tensor  # [slots] float64: ln of min-p, above 0 where there is none
    own_at: Tensor  # [1] int64


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    temperature_micro: Tensor,
    top_k: Tensor,
    top_p_micro: Tensor,
    keys: Tensor,
    tokens: Tensor,
    last_tokens: Tensor,
    space: SamplerSpace,
    controlled: Controlled | None = None,
) -> None:
    """tokens[row] and last_tokens[slot] become the token after `positions[row]`; -1 in tokens for logits not finite.

    logits [rows, vocab] of any float type; slots, positions, tokens [rows] int32, a row of a negative slot is left
    alone; by slot: temperature_micro, top_k, top_p_micro int32, keys [slots, 2] int32 (the bits of two words).
    """
    rows, n_vocab = logits.shape
    has = controlled is not None
    # Without them nothing of these is read.
    given = controlled or Controlled(slots, slots, slots)
    _find_boundary[(rows,)](
        logits,
        slots,
        temperature_micro,
        top_k,
        top_p_micro,
        space.boundary,
        given.min_p_log,
        given.controls,
        given.own_at,
        n_vocab,
        CHUNK=_BLOCK,
        CONTROLS=has,
        FIELDS=N_CONTROLS,
        num_warps=16,
    )
    _best_of_block[(rows, space.n_blocks)](
        logits,
        slots,
        positions,
        temperature_micro,
        keys,
        space.boundary,
        space.block_best,
        given.controls,
        given.own_at,
        n_vocab,
        space.n_blocks,
        BLOCK=_BLOCK,
        CONTROLS=has,
        FIELDS=N_CONTROLS,
        num_warps=8,
    )
    _choose[(rows,)](
        logits,
        slots,
        positions,
        temperature_micro,
        keys,
        space.boundary,
        space.block_best,
        tokens,
        last_tokens,
        given.controls,
        given.own_at,
        n_vocab,
        space.n_blocks,
        BLOCK=_BLOCK,
        CONTROLS=has,
        FIELDS=N_CONTROLS,
        BLOCKS_PAD=triton.next_power_of_2(space.n_blocks),
        num_warps=8,
    )
