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
Equal bits are promised for equal libraries, processor and number of threads; the profile names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
