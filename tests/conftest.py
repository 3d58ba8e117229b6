"""What must hold before any test module is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from hypothesis import settings

# How long one example takes says how busy the machine is, not whether the code is right.
settings.register_profile("llmd", deadline=None)
settings.load_profile("llmd")


def pytest_configure() -> None:
    """Kernels run in Triton's interpreter where there is no GPU.

    Triton reads the switch when a function is decorated, its own library's included, and transformers may import it:
    setting it in the modules that need it is too late if another module of the same process came first.
    """
    if importlib.util.find_spec("triton") is not None and not Path("/proc/driver/nvidia/version").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")
