"""Every kernel, and every variant that the engine launches, is machine code for a Hopper before any Hopper sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")
ROOT = Path(__file__).parents[4]


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90() -> None:
    """In a process of its own: here Triton interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    module = "tests.serve_app.engine.gpu.compile_for_hopper"
    done = subprocess.run([sys.executable, "-m", module, "gemma2"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels compile for sm_90" in done.stdout
