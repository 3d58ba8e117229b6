"""How a manifest says that weights are small numbers, and which tensor holds the scales of which.

The weight keeps its name and holds the numbers; its scales lie beside it under scale_of(name), in bfloat16.

    int8  [out, in]      and scales [out, 1]: a weight is its integer times its row's scale
    uint8 [out, in / 2]  and scales [out, in / 32]: four bits each, the even input in the low half; a weight is its
                         four bits less 8, times the scale of its 32 inputs
    float8_e4m3fn [out, in]  and scales [out, 1]: a weight is its number times its row's scale

Stacked experts have one dimension more, in front, and so have their scales.

A scale of four-bit weights has five significant bits at most, of 8-bit floats four, so that the product is exact in
bfloat16 and whoever multiplies, in whatever order, computes with the same values. Knows nothing of torch.
"""

from __future__ import annotations

from typing import Literal

# int4: embedding and head are int8 all the same, as they are read by row; fp8: e4m3
Scheme = Literal["int8", "int4", "fp8"]

GROUP = 32  # inputs that share a scale in uint8
_SUFFIX = "_scale"


def scale_of(name: str) -> str:
    """The name of the tensor that holds this one's scales."""
    return name + _SUFFIX


def scale_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales of small numbers of this dtype and shape; None if these are no quantised weight."""
    if len(shape) not in (2, 3):
        return None
    *rows, stored = shape
    if dtype in ("int8", "float8_e4m3fn"):
        return *rows, 1
    return (*rows, 2 * stored // GROUP) if dtype == "uint8" and 2 * stored % GROUP == 0 else None
