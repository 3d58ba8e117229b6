"""Weights to small numbers and back (quantised.py says what they mean). Pure functions of tensors.

Scales of four bits are searched for: of a few about the one that reaches the largest weight, that of least error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shard_tools.checkpoint.families import Parameter
from shard_tools.quantised import GROUP, Scheme
from shard_tools.shard_file import Dtype

_STEPS = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04)  # of the scale that reaches the largest weight
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")  # [experts, out, in]
_LARGEST_FP8 = 448.0
_ROWS = 256  # at a time: what is computed of them stays in a core's cache
_BAND = 16  # rows that the compiled step computes side by side


def integers_of(parameter: Parameter, n_layers: int, scheme: Scheme | None) -> Dtype | None:
    """What holds this parameter's small numbers, or None for one that stays as it is: norms, routers, odd shapes."""
    shape, name = parameter.shape, parameter.name
    routes = name.endswith((".gate.weight", ".router.weight"))
    is_matrix = len(shape) == 2 or (len(shape) == 3 and name.endswith(_EXPERTS))
    if scheme is None or not is_matrix or routes or shape[-2] % _BAND or shape[-1] % GROUP:
        return None
    if scheme == "fp8":
        return "float8_e4m3fn"
    in_layer = 0 < parameter.unit <= n_layers
    return "uint8" if scheme == "int4" and in_layer else "int8"


def quantised(weight: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """Small numbers and bfloat16 scales of a weight [out, in] or of several [experts, out, in]."""
    pairs = [_quantised(rows.float(), dtype) for rows in torch.split(weight.flatten(0, -2), _ROWS)]
    stored, scales = (torch.cat(part).view(*weight.shape[:-1], -1) for part in zip(*pairs, strict=True))
    return stored, scales


def _quantised(rows: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor]:
    if dtype == "int8":
        scales = _cut(rows.abs().amax(-1, keepdim=True) / 127, 8)
        return (rows / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8), scales.bfloat16()
    if dtype == "float8_e4m3fn":
        scales = _cut_upwards(rows.abs().amax(-1, keepdim=True) / _LARGEST_FP8, 4)
        return (rows / _divisor(scales)).to(torch.float8_e4m3fn), scales.bfloat16()
    groups = rows.view(len(rows), -1, GROUP)
    scales = _searched(groups)
    integers = (groups / _divisor(scales)).round_().clamp_(-8, 7).add_(8).to(torch.uint8).view(len(rows), -1)
    return integers[:, ::2] | integers[:, 1::2] << 4, scales[..., 0].bfloat16()


def integers(stored: Tensor) -> Tensor:
    """int8 [..., out, in] of what a shard holds: int8 as it is, uint8 unpacked."""
    if stored.dtype == torch.int8:
        return stored
    return torch.stack((stored & 15, stored >> 4), -1).view(*stored.shape[:-1], -1).to(torch.int8) - 8


def dequantised(stored: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., out, in]."""
    whole = stored.float() if stored.dtype == torch.float8_e4m3fn else integers(stored).float()
    return (whole.view(*scales.shape, -1) * scales.float()[..., None]).view(whole.shape)


def _searched(groups: Tensor) -> Tensor:
    """groups [rows, groups, n] -> [rows, groups, 1] float32, of five significant bits."""
    largest = groups.abs().amax(-1, keepdim=True) / 7
    best, least = _cut(largest, 5), torch.full_like(largest, torch.inf)
    for step in _STEPS:
        scale = _cut(largest * step, 5)
        found = (groups / _divisor(scale)).round_().clamp_(-8, 7).mul_(scale)
        error = found.sub_(groups).square_().sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _cut(x: Tensor, bits: int) -> Tensor:
    """To this many significant bits, the nearest."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def _cut_upwards(x: Tensor, bits: int) -> Tensor:
    """To this many significant bits, none smaller: 8-bit floats that come to more than the largest are no numbers."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).ceil() / 2**bits, exponent)


def _divisor(scales: Tensor) -> Tensor:
    """A group of zeros has the scale 0; its integers are 0 whatever they are divided by."""
    return torch.where(scales == 0, 1.0, scales)
