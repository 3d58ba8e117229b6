"""One row of logits as the sampler's launches read it: the model's, or the row's own where penalties changed them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_of(logits):
    """int32 keys in the order of the float32 logits; -0.0 counts as 0.0."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order(key):
    """The float32 of such a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def find_own(controls, own_at, slot, base, FIELDS: tl.constexpr):
    """Whether a row has logits of its own, and where they begin."""
    own = tl.load(own_at).to(tl.pointer_type(tl.float32)) + base
    return tl.load(controls + slot * FIELDS, mask=slot >= 0, other=0), own


@triton.jit
def load_row(logits, own, has_own, ids, here, other, CONTROLS: tl.constexpr):
    """float32 logits of these ids of one row; `other` where not here."""
    if CONTROLS:
        flag = tl.zeros(ids.shape, tl.int32) + has_own  # Triton's interpreter takes no mask made with a lone number
        x = tl.load(logits + ids, mask=here & (flag == 0), other=other).to(tl.float32)
        return tl.where(flag != 0, tl.load(own + ids, mask=here & (flag != 0), other=other), x)
    else:
        return tl.load(logits + ids, mask=here, other=other).to(tl.float32)
