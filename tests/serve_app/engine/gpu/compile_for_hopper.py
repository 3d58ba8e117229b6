"""Compiles every kernel that the GPU engine launches, down to machine code for sm_90, on a machine without a GPU.

    python -m tests.serve_app.engine.gpu.compile_for_hopper [FAMILY[:SCHEME[:KV]]...]

Triton is told that its device is a Hopper; launches compile and run nothing. What is computed is garbage, so the
start-up check of layers is left out. The engine is the real one: a kernel, a variant or an argument that this Triton
or ptxas refuses fails here and not on the first GPU. Prints what was compiled, with registers spilled.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from serve_app.engine import load
from serve_app.engine.block import Block, Integers, Linear, Router
from serve_app.engine.gpu import products, stage_weights
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.experts import ExpertSpace, experts_product
from serve_app.engine.gpu.first_steps import prompt_beside_a_row
from serve_app.engine.gpu.kernels import early_launch
from serve_app.engine.load import LoadOptions
from tests.engine_steps import STEPS, published


class Hopper:
    """As much of a driver as compiling asks for."""

    utils: Any = type("Utils", (), {"get_device_properties": staticmethod(lambda _: {"max_shared_mem": 232448})})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def wide_products() -> None:
    """Those of a model whose rows are as wide as an 8B model's: a tiny one's loops end after one turn."""
    for n, width in ((6144, 4096), (4096, 14336)):
        for rows in (1, 8, 64, 128, 600):
            x, out = (torch.empty((rows, size), dtype=torch.bfloat16) for size in (width, n))
            for stored, groups in (
                (torch.empty((n, width), dtype=torch.int8), 1),
                (torch.empty((n, width), dtype=torch.float8_e4m3fn), 1),
                (torch.empty((n, width // 2), dtype=torch.uint8), width // 32),
            ):
                scales = torch.empty((n, groups), dtype=torch.bfloat16)
                products.head_product(x, Linear(torch.empty(0), None, Integers(stored, scales)), out)
                if rows < products.WIDENED_FROM:
                    products._quantised(x, Integers(stored, scales), out, False, gated=True)


def wide_experts(block: Block) -> None:
    """As of a model with 128 experts, eight of them for a row."""
    router = Router(Linear(torch.empty((128, 2048), dtype=torch.bfloat16), None), 8, True, True)

    def matrices(n_out: int, width: int, dtype: torch.dtype) -> Linear:
        if dtype == torch.bfloat16:
            return Linear(torch.empty((128, n_out, width), dtype=dtype), None)
        four = dtype == torch.uint8
        stored = torch.empty((128, n_out, width // 2 if four else width), dtype=dtype)
        scales = torch.empty((128, n_out, width // 32 if four else 1), dtype=torch.bfloat16)
        return Linear(torch.empty(0), None, Integers(stored, scales))

    for dtype in (torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn):
        gate_up, down = matrices(1536, 2048, dtype), matrices(2048, 768, dtype)
        block = replace(block, router=router, gate_up=gate_up, down=down)
        for rows in (1, 8, 256, 600, 2048):
            x, out = (torch.empty((rows, 2048), dtype=torch.bfloat16) for _ in range(2))
            space = ExpertSpace(rows, [block], 2048, torch.device("cpu"), torch.bfloat16)
            experts_product(x, block, space, out)


def main(families: list[str]) -> int:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    compiled: dict[str, int] = {}
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel is not None and "cubin" in kernel.asm
        assert kernel.metadata.shared <= 232448, f"{kernel.name} wants {kernel.metadata.shared} bytes of shared memory"
        compiled[f"{kernel.name} {kernel.hash[:8]}"] = kernel.metadata.shared
        return kernel

    jit.JITFunction.run = compile_only  # type: ignore[method-assign]
    early_launch._supported = lambda: True  # type: ignore[assignment]
    stage_weights.require_layer = lambda *args, **kwargs: None  # type: ignore[assignment]
    stage_weights.require_logits = lambda *args: None  # type: ignore[assignment]
    products.torch.mm = lambda *args, out, **kwargs: None  # type: ignore[assignment]
    wide_products()
    products.WIDENED_FROM = 75  # of rows of a prompt here, not of decode rows
    for choice in families:
        family, scheme, kv = [*choice.split(":"), "", ""][:3]
        for deterministic in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                store, manifest = published(Path(folder), family, scheme or None)  # type: ignore[arg-type]
            loaded = load._read(store, manifest, 0, 2, LoadOptions("cpu", "bfloat16", 4, None))
            plain = loaded.plain(deterministic=False)
            weights = stage_weights.read_weights(plain, 4, loaded.integers, kv or "auto")  # type: ignore[arg-type]
            if weights.blocks[0].router is not None:
                wide_experts(weights.blocks[0])
            engine = GpuEngine(plain, weights, 4, deterministic, kv or "auto")  # type: ignore[arg-type]
            engine.reserve(120, 70)
            engine.hash_rows(bytes(56), bytes(56), hand_on=True)
            for plan in prompt_beside_a_row(4):  # large enough for the kernels that only large steps take
                engine.launch(plan, memoryview(bytes(4 * plan.rows)))
            for size in (1, 2, 64, 70):
                with torch.inference_mode():
                    engine._decode_step(size)
            for plan, rows in STEPS:
                engine.launch(plan, rows)
        print(f"{choice}: {len(compiled)} kernels so far", flush=True)
    print(f"triton {triton.__version__}: {len(compiled)} kernels compile for sm_90")
    return 0


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:]
            or ["qwen3", "gemma2", "llama", "qwen3:int8", "llama:int4", "qwen3:fp8", "qwen3::fp8", "qwen3_moe"]
        )
    )
