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

from serve_app.engine.block import Linear

Product = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]

_PACKED_FOR = 1  # rows oneDNN is told of when it chooses a layout


def product_of(matrix: Linear, *, packs: bool) -> Product:
    """The product with this matrix; packs: as oneDNN packs it, and the matrix itself is not read any more."""
    weight, bias = matrix.weight, matrix.bias
    if packs:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        pointwise: Any = torch.ops.mkldnn._linear_pointwise
        return lambda x: pointwise(x, packed, bias, "none", [], "")
    return lambda x: linear(x, weight, bias)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this dtype on this processor."""
    mkldnn: Any = torch.ops.mkldnn
    if not (torch._C._has_mkldnn and hasattr(mkldnn, "_reorder_linear_weight")):
        return False
    if dtype is torch.float32:
        return True
    probe = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return hasattr(mkldnn, probe) and bool(getattr(mkldnn, probe)())
