"""The compiled step (native.cpp) as Python calls it: the structs that it reads, and the memory they point at.

Fields stand in the order of native.cpp's structs. A stage that it does not compute is refused with NotFusable, and
torch's operators serve it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.block import Block, Linear, Norm, NotFusable
from serve_app.engine.cpu.native_build import native_library
from serve_app.engine.request_table import Ints

_log = logging.getLogger(__name__)
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
MAX_ROWS = 32  # of a step; beyond it oneDNN's products, which read weights once for all rows, are faster


class _Matrix(ctypes.Structure):
    _fields_ = [("data", _P), ("scales", _P), ("bias", _P), ("kind", _I), ("out", _I), ("in_", _I)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _P), ("eps", _F), ("offset", _F)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("heads", "kv_heads", "dim", "half", "window", "gelu")),
        *((name, _F) for name in ("scale", "softcap")),
        *((name, _P) for name in ("cos", "sin", "sinks", "cache")),
        *((name, _Norm) for name in ("norm_in", "q_norm", "k_norm", "after_attention", "norm_mid", "after_mlp")),
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
    ]


class _Stage(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _I) for name in ("n_layers", "hidden", "bf16", "page_size", "table_width")),
        ("page_table", _P),
        ("final", _Norm),
        ("head", _Matrix),
    ]


@cache
def library() -> Any:
    """The library, or None if there is none on this machine; a log line says so once."""
    path = native_library()
    if path is None:
        return None
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        _log.warning("the compiled step cannot be loaded, so torch's operators serve: %s", e)
        return None
    lib.llmd_runner.argtypes, lib.llmd_runner.restype = [_P, _I], _P
    lib.llmd_end.argtypes, lib.llmd_end.restype = [_P], None
    lib.llmd_step.argtypes, lib.llmd_step.restype = [_P, _P, _I, _P, _P, _I, _P, _I, _P], None
    lib.llmd_lanes.argtypes, lib.llmd_lanes.restype = [], ctypes.c_char_p
    return lib


class NativeStage:
    """Steps of few rows of one stage. Not for two threads at a time."""

    def __init__(
        self,
        blocks: Sequence[Block],
        caches: Sequence[Tensor],
        page_table: Ints,
        page_size: int,
        *,
        hidden: int,
        threads: int,
        final: Norm | None = None,
        head: Tensor | None = None,
    ) -> None:
        """All of these are read in place, and held. Raises NotFusable if it does not compute such a stage."""
        lib = library()
        if lib is None:
            raise NotFusable("there is no compiled step")
        self._lib, self._held = lib, [blocks, caches, page_table, final, head]
        dtype = blocks[0].qkv.weight.dtype
        self.lanes = lib.llmd_lanes().decode()
        self._vocab = len(head) if head is not None else 0
        self._layers = (_Layer * len(blocks))(*(_layer(b, c) for b, c in zip(blocks, caches, strict=True)))
        self._stage = _Stage(
            self._layers,
            len(blocks),
            hidden,
            int(dtype == torch.bfloat16),
            page_size,
            page_table.shape[1],
            page_table.ctypes.data,
            _norm(final),
            _matrix(Linear(head, None)) if head is not None else _Matrix(),
        )
        self._runner = lib.llmd_runner(ctypes.byref(self._stage), threads)

    def __del__(self) -> None:
        if hasattr(self, "_runner"):
            self._lib.llmd_end(self._runner)

    def run(self, x: Tensor, slots: Ints, positions: Ints, drawn: Ints) -> Tensor:
        """x: [rows, hidden], overwritten with what leaves the last layer; slots, positions: [rows].

        Returns float32 logits of the drawn rows, [drawn, vocab].
        """
        slots, positions, drawn = (np.ascontiguousarray(a, np.int32) for a in (slots, positions, drawn))
        assert x.is_contiguous() and len(slots) == len(positions) == len(x)
        logits = torch.empty((len(drawn), self._vocab), dtype=torch.float32)
        self._lib.llmd_step(
            self._runner,
            x.data_ptr(),
            len(x),
            slots.ctypes.data,
            positions.ctypes.data,
            int(len(np.unique(slots)) == len(slots)),
            drawn.ctypes.data,
            len(drawn) if self._vocab else 0,
            logits.data_ptr(),
        )
        return logits


def _layer(block: Block, cache: Tensor) -> _Layer:
    sinks = block.sinks
    if sinks is not None and sinks.dtype != torch.float32:
        raise NotFusable("attention sinks that are not of float32")
    return _Layer(
        block.heads,
        block.kv_heads,
        block.dim,
        block.cos.shape[1],
        block.window or 0,
        int(block.activation == "gelu_tanh"),
        block.scale,
        block.softcap or 0.0,
        block.cos.data_ptr(),
        block.sin.data_ptr(),
        sinks.data_ptr() if sinks is not None else None,
        cache.data_ptr(),
        *(
            _norm(norm)
            for norm in (
                block.norm_in,
                block.q_norm,
                block.k_norm,
                block.after_attention,
                block.norm_mid,
                block.after_mlp,
            )
        ),
        *(_matrix(matrix) for matrix in (block.qkv, block.out, block.gate_up, block.down)),
    )


def _norm(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.eps, float(norm.offset))


def _matrix(matrix: Linear) -> _Matrix:
    weight, bias = matrix.weight, matrix.bias
    out, wide = weight.shape
    if weight.dtype not in _KINDS or not weight.is_contiguous() or wide % 32:
        raise NotFusable(f"a {out} x {wide} matrix of {weight.dtype}")
    return _Matrix(
        weight.data_ptr(), None, bias.data_ptr() if bias is not None else None, _KINDS[weight.dtype], out, wide
    )
