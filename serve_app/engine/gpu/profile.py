"""What the GPU engine says of itself: it goes into signed statements, and the Head plans its pages by it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton

from serve_app.engine.engine import EngineProfile
from serve_app.engine.stage_weights import StageWeights
from serve_app.engine.torch_engine import TORCH_DTYPES


def profile_of(plain: EngineProfile, weights: StageWeights, page_size: int, deterministic: bool) -> EngineProfile:
    """plain: of the engine that the weights were read from, measured while it held them in full."""
    dtype = TORCH_DTYPES[plain.dtype]
    saved = _saved_bytes(weights, dtype)
    return replace(
        plain,
        description=f"{plain.description}, llmd_triton {triton.__version__}{', fixed tiles' * deterministic}",
        kv_page_bytes=sum(2 * b.kv_heads * page_size * b.dim * dtype.itemsize for b in weights.blocks),
        parameter_bytes=plain.parameter_bytes - saved,
        memory_bytes=plain.memory_bytes + saved,
    )


def _saved_bytes(weights: StageWeights, dtype: torch.dtype) -> int:
    """How many bytes fewer these weights take than the plain engine's of that dtype."""
    linears = [m for b in weights.blocks for m in (b.qkv, b.out, b.gate_up, b.down)]
    linears += [m for m in (weights.embedding, weights.head) if m is not None]
    found = {id(m.integers): m.integers for m in linears if m.integers is not None}
    return sum(math.prod(i.shape) * dtype.itemsize - i.stored.nbytes - i.scales.nbytes for i in found.values())
