"""Starting a kernel while the one before it still runs: what is known beforehand is fetched, the rest is waited for.

A step of one row is some two hundred kernels of a few microseconds, and a gap of one between each two is a tenth of the
step. Steps of many rows do without: there it cost up to 14 % (benchmarks/results/gpu_kernels.jsonl). Laws: a kernel
launched early calls `wait_for_inputs` on every path, before it touches anything that an earlier kernel writes or reads;
weights are neither.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization" (compute capability 9.0).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def _supported() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def starts_early(rows: int) -> bool:
    """Whether the kernels of a step of so many rows are launched early."""
    return rows == 1 and _supported()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """What all earlier kernels wrote is there; the next kernel may start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
