"""The compiled step (native.cpp) as Python calls it: the structs that it reads, and the memory they point at.

Fields stand in the order of native.cpp's structs. A stage that it does not compute is refused with NotFusable, and
torch's operators serve it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from serve_app.engine.block import Block, Linear, Norm, NotFusable
from serve_app.engine.request_table import Ints
from serve_app.native_build import CPU_STEP, load_library
from shard_tools.checkpoint.quantise import integers
from shard_tools.quantised import GROUP

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_BAND = 16
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


class Matrix:
    """A matrix where the compiled step reads it: a plain one in place, integers packed in bands of 16 outputs."""

    def __init__(self, matrix: Linear) -> None:
        """Raises NotFusable for one that the step does not read."""
        weight, bias, found = matrix.weight, matrix.bias, matrix.integers
        self.out, self._in = weight.shape
        if self._in % GROUP or not weight.is_contiguous():
            raise NotFusable(f"a matrix of {self._in} inputs, which is no multiple of {GROUP}")
        self._bias, self._scales = bias, torch.empty(0)
        if found is None or weight.dtype != torch.bfloat16:
            if weight.dtype not in _KINDS:
                raise NotFusable(f"a matrix of {weight.dtype}")
            self._kind, self._data = _KINDS[weight.dtype], weight
        elif found.stored.dtype == torch.int8:
            self._kind, self._data, self._scales = _INT8, _bands(found.stored), found.scales.contiguous()
        else:
            bands = _bands(integers(found.stored) + 8).view(-1, self._in // 8, 4, 2, _BAND).int()
            shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32)[:, None, None]
            words = (bands << shifts).sum(2, dtype=torch.int32)  # [bands, in / 8, parity, output]
            self._kind, self._data = _INT4, words.transpose(2, 3).to(torch.uint16).contiguous()
            self._scales = found.scales.view(-1, _BAND, self._in // GROUP).transpose(1, 2).contiguous()

    @property
    def struct(self) -> _Matrix:
        """What the step is told; it lives no longer than this matrix."""
        bias = self._bias.data_ptr() if self._bias is not None else None
        return _Matrix(self._data.data_ptr(), self._scales.data_ptr(), bias, self._kind, self.out, self._in)

    @property
    def is_packed(self) -> bool:
        """Whether it is a copy, so that what it was made from may go."""
        return self._kind in (_INT8, _INT4)

    def product(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out] for many rows, by oneDNN, from the same values."""
        if not self.is_packed:
            return linear(x, self._data, self._bias)
        wide = torch.empty((self.out, self._in), dtype=torch.bfloat16)
        library().llmd_widen(ctypes.byref(self.struct), wide.data_ptr())
        if self._kind == _INT4:
            return linear(x, wide, self._bias)
        y = linear(x, wide).mul_(self._scales[:, 0])
        return y if self._bias is None else y.add_(self._bias)


def _bands(whole: Tensor) -> Tensor:
    """[out, in] -> [out / 16, in, 16]."""
    return whole.view(-1, _BAND, whole.shape[1]).transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """A block whose matrices the compiled step can read."""

    block: Block
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix

    @classmethod
    def of(cls, block: Block) -> NativeLayer:
        """Raises NotFusable."""
        matrices = (Matrix(m) for m in (block.qkv, block.out, block.gate_up, block.down))
        return cls(block, *matrices)


@cache
def library() -> Any:
    """The library, or None if there is none on this machine; a log line says so once."""
    lib = load_library(CPU_STEP)
    if lib is None:
        return None
    lib.llmd_runner.argtypes, lib.llmd_runner.restype = [_P, _I], _P
    lib.llmd_end.argtypes, lib.llmd_end.restype = [_P], None
    lib.llmd_step.argtypes, lib.llmd_step.restype = [_P, _P, _I, _P, _P, _I, _P, _I, _P], None
    lib.llmd_widen.argtypes, lib.llmd_widen.restype = [_P, _P], None
    lib.llmd_lanes.argtypes, lib.llmd_lanes.restype = [], ctypes.c_char_p
    return lib


class NativeStage:
    """Steps of few rows of one stage. Not for two threads at a time."""

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        caches: Sequence[Tensor],
        page_table: Ints,
        page_size: int,
        *,
        hidden: int,
        threads: int,
        final: Norm | None = None,
        head: Matrix | None = None,
    ) -> None:
        """All of these are read in place, and held. Raises NotFusable if it does not compute such a stage."""
        lib = library()
        if lib is None:
            raise NotFusable("there is no compiled step")
        self._lib, self._held = lib, [layers, caches, page_table, final, head]  # what C++ reads must live as long
        dtype = layers[0].block.norm_in.weight.dtype
        self.lanes = lib.llmd_lanes().decode()
        self._vocab = head.out if head is not None else 0
        self._layers = (_Layer * len(layers))(*(_layer(b, c) for b, c in zip(layers, caches, strict=True)))
        self._stage = _Stage(
            self._layers,
            len(layers),
            hidden,
            int(dtype == torch.bfloat16),
            page_size,
            page_table.shape[1],
            page_table.ctypes.data,
            _norm(final),
            head.struct if head is not None else _Matrix(),
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


def _layer(layer: NativeLayer, cache: Tensor) -> _Layer:
    block = layer.block
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
        *(matrix.struct for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)),
    )


def _norm(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.eps, float(norm.offset))
