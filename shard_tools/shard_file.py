"""The bytes of one shard: a safetensors file whose header follows from its tensors alone.

Law: equal (name, dtype, shape) lists give equal headers, so a shard's header need not be trusted: it is derived.
Tensors lie one after another without holes, in the order given by `file_order`.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

FloatDtype = Literal["float32", "bfloat16", "float16"]
Dtype = FloatDtype | Literal["int8", "uint8", "float8_e4m3fn"]  # the last three are of quantised weights alone

FLOATS: tuple[FloatDtype, ...] = get_args(FloatDtype)

ITEM_BYTES: dict[Dtype, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
}
SAFETENSORS_DTYPES: dict[Dtype, str] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
}
_ALIGN = 8  # header padded with spaces, so that the first tensor is aligned


def tensor_bytes(dtype: Dtype, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    return prod(shape) * ITEM_BYTES[dtype]


def file_order(name: str, dtype: Dtype) -> tuple[int, str]:
    """Sort key of tensors in a file: wide items first keep every tensor aligned to its items, then by name."""
    return -ITEM_BYTES[dtype], name


def header(tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]]) -> bytes:
    """The safetensors header, length prefix included, of tensors (name, dtype, shape) in file order."""
    table: dict[str, object] = {}
    at = 0
    for name, dtype, shape in tensors:
        stop = at + tensor_bytes(dtype, shape)
        table[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text
