"""The gate of a gated MLP: act(gate) * up, from one row of both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.block import Activation
from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs


@triton.jit
def activate(gate, GELU: tl.constexpr):
    """act(gate) in float32."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _gate(x, out, width, GELU: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < width
    kind = out.dtype.element_ty
    gate = tl.load(x + row * 2 * width + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=real, other=0.0).to(tl.float32)
    # transformers rounds the activation before it multiplies.
    tl.store(out + row * width + at, (activate(gate, GELU).to(kind).to(tl.float32) * up).to(kind), mask=real)


def gate(x: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """x [rows, 2 * width], gate then up -> out [rows, width]."""
    rows, width = out.shape
    block, early = 1024, starts_early(rows)
    _gate[(rows, triton.cdiv(width, block))](
        x, out, width, GELU=activation == "gelu_tanh", BLOCK=block, EARLY=early, num_warps=4, launch_pdl=early
    )
