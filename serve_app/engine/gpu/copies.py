"""Copies between the host and the GPU that the host does not wait for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.request_table import Ints


def upload(host: Ints, device: Tensor) -> None:
    """device [n] int32 becomes what host holds."""
    # Memory of torch's pinned cache: 30 times as fast as pin_memory() of an array.
    staged = torch.empty(host.size, dtype=torch.int32, pin_memory=device.is_cuda)
    staged.numpy()[:] = host.reshape(-1)
    device.copy_(staged, non_blocking=True)


def upload_all(arrays: tuple[Ints, ...], device: torch.device) -> list[Tensor]:
    """Several arrays in one copy, each [its length] int32 on the device."""
    whole = np.concatenate(arrays).astype(np.int32, copy=False)
    there = torch.empty(len(whole), dtype=torch.int32, device=device)
    upload(whole, there)
    return list(torch.split(there, [len(a) for a in arrays]))


def upload_rows(rows: memoryview, device: Tensor) -> None:
    """device [n, width], contiguous, becomes the bytes of n rows."""
    staged = torch.empty(device.shape, dtype=device.dtype, pin_memory=device.is_cuda)
    staged.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(rows, np.uint8)
    device.copy_(staged, non_blocking=True)


def download(device: Tensor) -> Tensor:
    """A copy on the host that is there once the stream has come so far."""
    host = torch.empty(device.shape, dtype=device.dtype, pin_memory=device.is_cuda)
    host.copy_(device, non_blocking=True)
    return host
