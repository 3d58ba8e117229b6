"""Draws one token per row from its logits by engine/sampler.py's rule, without the host waiting.

Three launches. Rows with top-k or top-p first find the boundary of what they leave: bisection over the logits' bit
patterns, no sort. Then every block of the vocabulary finds its best score in float32. The last launch looks again,
in float64, at the tokens whose float32 score is so near the best that rounding could have changed the order;
so the token is that of the float64 rule, whatever the block size or batch.
Noise: Philox4x32-10 of Salmon et al. 2011, counter (position, token id), as in engine/philox.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # of the vocabulary, for one program of the second launch
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _philox(position, ids, k0, k1):
    """Word 0 of counter (position, id, 0, 0): uint32."""
    zero = tl.zeros(ids.shape, tl.uint32)
    m0 = tl.full(ids.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(ids.shape, 0xCD9E8D57, tl.uint32)
    c0 = zero + position
    c1 = ids
    c2 = zero
    c3 = zero
    k0 = zero + k0
    k1 = zero + k1
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, m0)
        lo0 = c0 * m0
        hi1 = tl.umulhi(c2, m1)
        lo1 = c2 * m1
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + tl.full(ids.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(ids.shape, 0xBB67AE85, tl.uint32)
    return c0


@triton.jit
def _gumbel32(bits):
    """Standard Gumbel noise in float32 of u = (bits + 1/2) / 2^32, right to a few units even where u is near 1."""
    upper = bits >= tl.full(bits.shape, 0x80000000, tl.uint32)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((~bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, which u itself cannot hold
    w = 1.0 - v
    near_one = tl.where(w == 1.0, v, tl.log(w) * (v / (w - 1.0)))  # -log(1 - v)
    return -tl.log(tl.where(upper, near_one, -tl.log(u)))


@triton.jit
def _order(logits):
    """int32 keys in the order of the float32 logits; -0.0 counts as 0.0."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _find_boundary(
    logits,
    slots,
    temperature_micro,
    top_k,
    top_p_micro,
    boundary,
    n_vocab,
    CHUNK: tl.constexpr,
):
    """boundary[row] = (key, id): allowed are keys above it, and equal keys of ids up to it."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    k = tl.load(top_k + slot, mask=slot >= 0, other=0)
    p_micro = tl.load(top_p_micro + slot, mask=slot >= 0, other=1000000)
    t_micro = tl.load(temperature_micro + slot, mask=slot >= 0, other=0)
    tl.store(boundary + row * 2, _LOWEST)
    tl.store(boundary + row * 2 + 1, n_vocab)
    if (slot < 0) | (t_micro == 0) | ((k == 0) & (p_micro == 1000000)):
        return
    offs = tl.arange(0, CHUNK)
    base = logits + row.to(tl.int64) * n_vocab
    key = tl.full([], _LOWEST, tl.int32)
    quota = n_vocab  # how many tokens of the boundary's own key are allowed
    if (k > 0) & (k < n_vocab):
        low = tl.full([], _LOWEST, tl.int64)  # count(key >= low) >= k always
        high = tl.full([], 2147483647, tl.int64)  # count(key >= high) < k: no finite logit has this key
        while high - low > 1:
            middle = (low + high) // 2
            count = 0
            for n in range(0, n_vocab, CHUNK):
                x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
                count += tl.sum(((_order(x) >= middle) & (n + offs < n_vocab)).to(tl.int32), 0)
            if count >= k:
                low = middle
            else:
                high = middle
        key = low.to(tl.int32)
        above = 0
        for n in range(0, n_vocab, CHUNK):
            x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
            above += tl.sum(((_order(x) > key) & (n + offs < n_vocab)).to(tl.int32), 0)
        quota = k - above
    if p_micro < 1000000:
        best = float("-inf")
        for n in range(0, n_vocab, CHUNK):
            x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, tl.max(x, 0))
        sharp = 1e6 / t_micro.to(tl.float32)
        total = tl.full([], 0.0, tl.float64)
        tie = tl.full([], 0.0, tl.float64)  # weight of one token of the boundary's own key
        for n in range(0, n_vocab, CHUNK):
            x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
            weight = tl.where(n + offs < n_vocab, tl.exp((x - best) * sharp), 0.0)
            order = _order(x)
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
                x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
                inside = (_order(x) >= middle) & (n + offs < n_vocab)
                mass += tl.sum(tl.where(inside, tl.exp((x - best) * sharp), 0.0), 0).to(tl.float64)
            if mass >= wanted:
                low = middle
            else:
                high = middle
        found = low.to(tl.int32)
        above_mass = tl.full([], 0.0, tl.float64)
        own = tl.full([], 0.0, tl.float64)
        for n in range(0, n_vocab, CHUNK):
            x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
            weight = tl.where(n + offs < n_vocab, tl.exp((x - best) * sharp), 0.0)
            order = _order(x)
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
        x = tl.load(base + n + offs, mask=n + offs < n_vocab, other=float("-inf")).to(tl.float32)
        equal = ((_order(x) == key) & (n + offs < n_vocab)).to(tl.int32)
        rank = used + tl.cumsum(equal, 0)
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (rank <= quota), n + offs, -1), 0))
        used += tl.sum(equal, 0)
    tl.store(boundary + row * 2, key)
    tl.store(boundary + row * 2 + 1, last)


@triton.jit
def _score32(x, ids, allowed, t_micro, position, k0, k1):
    """What the float64 rule would score, in float32; greedy rows score their logit."""
    if t_micro == 0:
        score = x
    else:
        score = x * (1e6 / t_micro.to(tl.float32)) + _gumbel32(_philox(position, ids.to(tl.uint32), k0, k1))
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def _allowed(x, ids, n_vocab, boundary, row):
    key = tl.load(boundary + row * 2)
    last = tl.load(boundary + row * 2 + 1)
    order = _order(x)
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
    n_vocab,
    n_blocks,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * n_vocab + ids, mask=ids < n_vocab, other=0.0).to(tl.float32)
    broken = tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 0)
    allowed = _allowed(x, ids, n_vocab, boundary, row)
    t_micro = tl.load(temperature_micro + slot)
    k0 = tl.load(keys + slot * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + slot * 2 + 1).to(tl.uint32, bitcast=True)
    position = (tl.load(positions + row) + 1).to(tl.uint32)
    score = _score32(x, ids, allowed, t_micro, position, k0, k1)
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
    n_vocab,
    n_blocks,
    BLOCK: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
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
    best = tl.full([], float("-inf"), tl.float64)
    token = n_vocab
    for block in range(n_blocks):
        if tl.load(block_best + row * n_blocks + block) >= near:
            ids = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row.to(tl.int64) * n_vocab + ids, mask=ids < n_vocab, other=0.0).to(tl.float32)
            allowed = _allowed(x, ids, n_vocab, boundary, row)
            score = _score32(x, ids, allowed, t_micro, position, k0, k1)
            chosen = allowed & (score >= near)
            exact = x.to(tl.float64)
            if t_micro != 0:
                bits = _philox(position, ids.to(tl.uint32), k0, k1)
                u = (bits.to(tl.float64) + 0.5) / 4294967296.0
                exact = exact / (t_micro.to(tl.float64) / 1e6) - tl.log(-tl.log(u))
            exact = tl.where(chosen, exact, float("-inf"))
            here = tl.max(exact, 0)
            first = tl.min(tl.where(exact == here, ids, n_vocab), 0)
            if here > best:  # an equal one of a later block has a higher id
                best = here
                token = first
    tl.store(tokens + row, token)
    tl.store(last_tokens + slot, token)


class SamplerSpace:
    """Work space of one batch size: nothing is allocated while a graph replays."""

    def __init__(self, rows: int, n_vocab: int, device: torch.device) -> None:
        self.n_blocks = triton.cdiv(n_vocab, _BLOCK)
        self.boundary = torch.empty((rows, 2), dtype=torch.int32, device=device)
        self.block_best = torch.empty((rows, self.n_blocks), dtype=torch.float32, device=device)


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
) -> None:
    """tokens[row] and last_tokens[slot] become the token after `positions[row]`; -1 in tokens for logits not finite.

    logits [rows, vocab] of any float type; slots, positions, tokens [rows] int32, a row of a negative slot is left
    alone; by slot: temperature_micro, top_k, top_p_micro int32, keys [slots, 2] int32 (the bits of two words).
    """
    rows, n_vocab = logits.shape
    _find_boundary[(rows,)](
        logits, slots, temperature_micro, top_k, top_p_micro, space.boundary, n_vocab, CHUNK=_BLOCK, num_warps=16
    )
    _best_of_block[(rows, space.n_blocks)](
        logits,
        slots,
        positions,
        temperature_micro,
        keys,
        space.boundary,
        space.block_best,
        n_vocab,
        space.n_blocks,
        BLOCK=_BLOCK,
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
        n_vocab,
        space.n_blocks,
        BLOCK=_BLOCK,
        BLOCKS_PAD=triton.next_power_of_2(space.n_blocks),
        num_warps=8,
    )
