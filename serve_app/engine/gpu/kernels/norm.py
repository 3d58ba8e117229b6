"""RMS norm, with the addition to the residual stream that comes before it.

Equals transformers' order of rounding: the sum in the activations' dtype, the square mean in float32, the normalised
row rounded once, then times the weight. Gemma's multiplies by (1 + weight) before it rounds.
Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs


@triton.jit
def _add_norm(
    x,
    residual,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GEMMA: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    real = at < WIDTH
    kind = out.dtype.element_ty
    w = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    values = tl.load(x + row * WIDTH + at, mask=real, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * WIDTH + at, mask=real, other=0.0).to(tl.float32)
        values = values.to(kind).to(tl.float32)
        tl.store(residual + row * WIDTH + at, values.to(kind), mask=real)
    scaled = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)
    scaled = scaled * (1.0 + w) if GEMMA else scaled.to(kind).to(tl.float32) * w
    tl.store(out + row * WIDTH + at, scaled.to(kind), mask=real)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None, gemma: bool = False
) -> None:
    """out = norm(x), or residual += x and out = norm(residual). All [rows, width]; weight [width]."""
    width = x.shape[1]
    pad = triton.next_power_of_2(width)
    early = starts_early(len(x))
    _add_norm[(len(x),)](
        x,
        residual,
        weight,
        out,
        eps,
        WIDTH=width,
        PAD=pad,
        HAS_RESIDUAL=residual is not None,
        GEMMA=gemma,
        num_warps=min(max(pad // 512, 1), 16),
        EARLY=early,
        launch_pdl=early,
    )
