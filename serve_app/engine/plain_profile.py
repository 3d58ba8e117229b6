"""How plain torch ops name what they compute by, in statements, calibrations and bands."""

from __future__ import annotations

import torch
import transformers

from serve_app.engine.attention import NAME
from serve_app.engine.fixed_windows import terms


def plain_profile(dtype: torch.dtype, device: torch.device, window: int | None) -> str:
    """window: rows, of an engine that is deterministic."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, {NAME}"
    fixed = "" if window is None else f", {terms(window, device)}"
    return f"{libraries}, {str(dtype).removeprefix('torch.')}, {name}{fixed}"
