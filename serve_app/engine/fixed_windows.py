"""Rows through a model in windows of one fixed shape, so that a row's bits do not depend on what runs beside it.

What makes them depend on it otherwise, found on torch 2.13 (MKL's sgemm, oneDNN's bfloat16, AVX-512, 1 and 2 threads):
- a matrix product takes another kernel, with another order of summation, for another number of rows: in float32 one row
  differs from several, and with 2 threads odd numbers from even ones; in bfloat16 from widths of about 1,500 inputs on.
  Within one shape, of an even number of rows, every place gives the same bits.
- SDPA cuts rows and keys into blocks by their numbers.
- SiLU and GELU compute the last elements of a tensor, and of each thread's share, by other instructions than the rest:
  rows whose width is no multiple of the vector's see that.
- sums, means, softmax and layer norms over the last dimension did not depend on the number of rows.
So all of a layer but attention runs on windows of exactly `size` rows, short ones padded with zeros, and every row
attends alone (attention.py), to keys whose number its position fixes. Whether places in a window are equal, on this
machine and with this model, is not assumed but tried at start-up (`fitting_size`); a window of one row always fits.
Where rows choose experts it is the only one: who else is in a window decides how many rows an expert multiplies, and
a try of some rows does not meet every number (gpt-oss in float32 passed one at 4 rows, and rows differed later).
Equal bits are promised for equal libraries, processor and number of threads; the profile names them (`terms`).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_PROCESSOR = 50  # characters; a profile has 200
_VECTORS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")  # flags that kernels are chosen by
SIZES = (16, 8, 4, 2, 1)  # 16 rows: a decode step pays for 16, a prompt is read 16 at a time


def windows(rows: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, rows, [size, ...]) of each window of rows [n, ...]; the last one padded with zeros."""
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        # A fresh tensor, so that its place in memory does not depend on where the window begins either.
        window = rows.new_zeros((size, *rows.shape[1:]))
        window[: len(part)] = part
        yield first, len(part), window


def fitting_size(hidden_of: Callable[[int, int], Tensor]) -> int:
    """The largest window in which it does not matter at which place and beside which rows a row stands.

    hidden_of(size, before): what a fixed probe of rows becomes in windows of `size`, behind `before` rows of others.
    """
    for size in SIZES[:-1]:
        alone = hidden_of(size, 0)
        if all(torch.equal(alone, hidden_of(size, before)) for before in (1, size // 2 + 1)):
            return size
    return 1


def window_of(config: Mapping[str, Any], hidden_of: Callable[[int, int], Tensor]) -> int:
    """The window for a model of this config: the same in every stage of it. hidden_of: as for `fitting_size`."""
    return 1 if has_experts(config) else fitting_size(hidden_of)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether layers of this model choose among several experts, by whatever name its config has for them."""
    return any(
        has_experts(value) if isinstance(value, Mapping) else "expert" in str(name) and type(value) is int and value > 1
        for name, value in config.items()
    )


def terms(size: int, device: torch.device) -> str:
    """What else has to be equal for equal bits, for a profile."""
    # numpy: what is drawn from these bits rests on its exp and log.
    named = f"numpy {np.__version__}, windows of {size} rows, {torch.get_num_threads()} threads"
    return f"{named}, {processor()}" if device.type == "cpu" else named


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """This host's processor as far as arithmetic libraries choose kernels by it: name, numbers, a hash of its vectors.

    The hash, because a hypervisor can hide what the name promises.
    """
    if not cpuinfo.exists():  # not Linux: the name alone, which must do
        return platform.processor()[:_MAX_PROCESSOR] or "unknown processor"
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features", "")
    vectors = sorted(flag for flag in flags.split() if flag.startswith(_VECTORS))
    numbers = [facts[name] for name in ("cpu family", "model", "stepping", "CPU part", "CPU variant") if name in facts]
    digest = hashlib.sha256(" ".join(vectors).encode()).hexdigest()[:8]
    return f"{facts.get('model name', 'processor')[:_MAX_PROCESSOR]} {'.'.join(numbers)} {digest}"
