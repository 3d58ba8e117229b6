"""The noise of a draw on the GPU: Philox4x32-10, word id % 4 of counter (position, id // 4), as in engine/philox.py.

Source: Salmon et al. 2011 (Random123).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def noise_bits(position, first_id, k0, k1, BLOCK: tl.constexpr):
    """uint32 for each of BLOCK ids from first_id on, which divides by four."""
    c1 = (first_id // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros(c1.shape, tl.uint32)
    m0 = tl.full(c1.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c1.shape, 0xCD9E8D57, tl.uint32)
    c0 = zero + position
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
        k0 = k0 + tl.full(c1.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(c1.shape, 0xBB67AE85, tl.uint32)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def gumbel32(bits):
    """Standard Gumbel noise in float32 of u = (bits + 1/2) / 2^32, right to a few units even where u is near 1."""
    upper = bits >= tl.full(bits.shape, 0x80000000, tl.uint32)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((~bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, which u itself cannot hold
    w = 1.0 - v
    log = tl.log(tl.where(upper, w, u))
    near_one = tl.where(w == 1.0, v, log * (v / (w - 1.0)))  # -log(1 - v)
    return -tl.log(tl.where(upper, near_one, -log))
