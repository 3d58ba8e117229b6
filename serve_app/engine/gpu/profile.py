"""What the GPU engine says of itself: it goes into signed statements, and the Head plans its pages by it."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from serve_app.engine.engine import EngineProfile, KvDtype
from serve_app.engine.stage_weights import StageWeights
from serve_app.engine.torch_engine import TORCH_DTYPES


def kv_dtype(activations: torch.dtype, kv: KvDtype) -> torch.dtype:
    """What pages hold."""
    return torch.float8_e4m3fn if kv == "fp8" else activations


def profile_of(
    plain: EngineProfile, weights: StageWeights, page_size: int, deterministic: bool, kv: KvDtype
) -> EngineProfile:
    """plain: of the engine that the weights were read from, measured while it held them in full."""
    dtype = TORCH_DTYPES[plain.dtype]
    saved = _saved_bytes(weights, dtype)
    return replace(
        plain,
        description=f"{plain.description}, llmd_triton {triton.__version__}"
        f"{', fixed tiles' * deterministic}{', fp8 keys and values' * (kv == 'fp8')}",
        kv_page_bytes=sum(2 * b.kv_heads * page_size * _row_bytes(b.dim, kv_dtype(dtype, kv)) for b in weights.blocks),
        parameter_bytes=plain.parameter_bytes - saved,
        memory_bytes=plain.memory_bytes + saved,
    )


def _row_bytes(dim: int, dtype: torch.dtype) -> int:
    """Of one head at one position; 8-bit floats have a float32 scale beside them."""
    return dim * dtype.itemsize + 4 * (dtype == torch.float8_e4m3fn)


def _saved_bytes(weights: StageWeights, dtype: torch.dtype) -> int:
    """How many bytes fewer these weights take than the plain engine's of that dtype."""
    linears = [m for b in weights.blocks for m in (b.qkv, b.out, b.gate_up, b.down)]
    linears += [m for m in (weights.embedding, weights.head) if m is not None]
    found = {id(m.integers): m.integers for m in linears if m.integers is not None}
    return sum(
        i.scales.shape[:-1].numel() * i.shape[1] * dtype.itemsize - i.stored.nbytes - i.scales.nbytes
        for i in found.values()
    )
