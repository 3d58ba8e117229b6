"""The noise of a draw on the GPU: Philox4x32-10, counter (position, token id), as in engine/philox.py.

Source: Salmon et al. 2011 (Random123).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(position, ids, k0, k1):
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
def gumbel32(bits):
    """Standard Gumbel noise in float32 of u = (bits + 1/2) / 2^32, right to a few units even where u is near 1."""
    upper = bits >= tl.full(bits.shape, 0x80000000, tl.uint32)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((~bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, which u itself cannot hold
    w = 1.0 - v
    near_one = tl.where(w == 1.0, v, tl.log(w) * (v / (w - 1.0)))  # -log(1 - v)
    return -tl.log(tl.where(upper, near_one, -tl.log(u)))
