"""Products of rows with a weight matrix, by torch's own operators; the values are the shard's in every one of them.

A weight that oneDNN has packed is read at twice the speed of a plain one when a step has few rows, and no slower in
prompts (1 x 576 by 3072 x 576 in bfloat16, two cores of an EPYC Genoa: 77 us against 152), so it alone is kept,
unless the compiled step (native.py) reads plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from serve_app.engine.block import Integers, Linear
from shard_tools.checkpoint.quantise import dequantised, integers
from shard_tools.quantised import GROUP

Product = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]

_FEW_ROWS = 16  # beyond, a product in bfloat16 is faster than one with integers
_PACKED_FOR = 1  # rows oneDNN is told of when it chooses a layout


def product_of(matrix: Linear, *, packs: bool) -> Product:
    """The product with this matrix; packs: as oneDNN packs it, and the matrix itself is not read any more."""
    weight, bias = matrix.weight, matrix.bias
    if matrix.integers is not None and weight.dtype == torch.bfloat16:
        return _of_integers(matrix.integers, bias)
    if packs:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        pointwise: Any = torch.ops.mkldnn._linear_pointwise
        return lambda x: pointwise(x, packed, bias, "none", [], "")
    return lambda x: linear(x, weight, bias)


def _of_integers(found: Integers, bias: Tensor | None) -> Product:
    """torch's own products with integers for few rows, and the same values in bfloat16 for many."""
    few, many = _by_row(found) if found.stored.dtype == torch.int8 else _by_group(found)

    def product(x: Tensor) -> Tensor:
        y = few(x) if len(x) <= _FEW_ROWS else many(x)
        return y if bias is None else y.add_(bias)

    return product


def _by_row(found: Integers) -> tuple[Product, Product]:
    whole, scales = found.stored, found.scales[:, 0].contiguous()
    return lambda x: torch._weight_int8pack_mm(x, whole, scales), lambda x: linear(x, whole.bfloat16()).mul_(scales)


def _by_group(found: Integers) -> tuple[Product, Product]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((integers(found.stored) + 8).int(), 2)
    # [groups, out, 2]: the scale, and what is added, which is nothing: the operator takes 8 off by itself
    scales = torch.stack((found.scales.t(), torch.zeros_like(found.scales.t())), -1).contiguous()
    int4: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    return (
        lambda x: int4(x, packed, GROUP, scales),
        lambda x: linear(x, dequantised(found.stored, found.scales).bfloat16()),
    )


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this dtype on this processor."""
    mkldnn: Any = torch.ops.mkldnn
    if not (torch._C._has_mkldnn and hasattr(mkldnn, "_reorder_linear_weight")):
        return False
    if dtype is torch.float32:
        return True
    probe = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return hasattr(mkldnn, probe) and bool(getattr(mkldnn, probe)())
