"""Products with weights of small integers at the shapes of Llama-3-8B, beside cuBLAS with as many in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu_time import DEVICE, KIND, time_us
from serve_app.engine.block import Integers, Linear
from serve_app.engine.gpu import products
from serve_app.engine.gpu.kernels.activation import gate
from serve_app.engine.gpu.kernels.quantised_product import quantised_product

SHAPES = {"8b_qkv": (6144, 4096, False), "8b_gate_up": (28672, 4096, True), "8b_down": (4096, 14336, False)}
ROWS = (1, 8, 32, 64, 256, 2048)
Variant = tuple[int, int, int, int, int]  # block_m, block_n, block_k, warps, stages


def variants(rows: int) -> list[Variant]:
    """To be tried beside what the engine takes."""
    if rows == 1:
        return [(1, 4, 512, 4, 2), (1, 4, 1024, 4, 2), (1, 8, 512, 4, 2), (16, 32, 128, 4, 6), (16, 64, 128, 4, 4)]
    m = max(16, triton.next_power_of_2(rows))
    if rows <= 64:
        return [(m, 32, 128, 4, 6), (m, 64, 64, 4, 4), (m, 128, 128, 8, 3), (m, 32, 256, 4, 3)]
    return [(128, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 128, 4, 3), (256, 128, 64, 8, 3)]


def integers_of(n: int, width: int, four: bool) -> Integers:
    """Random ones."""
    if four:
        stored = torch.randint(0, 256, (n, width // 2), device=DEVICE, dtype=torch.uint8)
    else:
        stored = torch.randint(-127, 128, (n, width), device=DEVICE, dtype=torch.int8)
    scales = torch.rand((n, width // 32 if four else 1), device=DEVICE).to(KIND) / 1000
    return Integers(stored, scales)


def quantised(quick: bool) -> dict[str, Any]:
    """For each shape and number of rows: cuBLAS, what the engine takes, the best variants, a widened copy."""
    out: dict[str, Any] = {}
    for name, (n, width, gated) in SHAPES.items():
        copies = max(1, min(8, (400 << 20) // (n * width)))
        wide = [torch.randn((n, width), device=DEVICE, dtype=KIND) for _ in range(max(1, copies // 2))]
        for four in (False, True):
            weights = [integers_of(n, width, four) for _ in range(copies)]
            n_bytes = sum(t.nbytes for t in (weights[0].stored, weights[0].scales))
            for rows in ROWS:
                x = torch.randn((rows, width), device=DEVICE, dtype=KIND)
                y = torch.empty((rows, n // 2 if gated else n), device=DEVICE, dtype=KIND)
                both = torch.empty((rows, n), device=DEVICE, dtype=KIND)
                line = ""
                if not four:
                    blas = time_us([lambda w=w: torch.mm(x, w.t(), out=both) for w in wide * 4])
                    out[f"{name}_{rows}_bf16_us"] = round(blas, 1)
                    line = f"bfloat16 by cuBLAS {blas:.1f} us | "

                def time(call: Callable[[Integers], None], weights: list[Integers] = weights) -> float:
                    return time_us([lambda w=w: call(w) for w in weights * max(1, 8 // copies)])

                taken = time(lambda w, x=x, y=y, both=both: _engine(x, w, y, both, gated))
                key = f"{name}_{rows}_{'int4' if four else 'int8'}"
                out[f"{key}_us"], out[f"{key}_GB_s"] = round(taken, 1), round(n_bytes / taken / 1e3)
                best = []
                for variant in [] if quick else variants(rows):
                    m, block_n, block_k, warps, stages = variant
                    call = lambda w, x=x, y=y: quantised_product(
                        x, w, y, gated=gated, block_m=m, block_n=block_n, block_k=block_k, warps=warps, stages=stages
                    )  # fmt: skip
                    try:
                        best.append((round(time(call), 1), variant))
                    except triton.runtime.errors.OutOfResources:
                        pass
                if best:
                    out[f"{key}_variants"] = sorted(best)[:3]
                if rows >= 256:
                    widened = time(lambda w, x=x, both=both: products._widened(x, w, both, None))
                    out[f"{key}_widened_us"] = round(widened, 1)
                    line += f"widened {widened:.1f} us | "
                line += f"engine {taken:.1f} us {n_bytes / taken / 1e3:.0f} GB/s"
                print(key, line, sorted(best)[:2], flush=True)
    return out


def _engine(x: Tensor, weight: Integers, y: Tensor, both: Tensor, gated: bool) -> None:
    """What products.py takes; beyond its WIDENED_FROM rows a gated product is two."""
    widened = products._is_widened(x, False)
    if gated and not widened:
        products._quantised(x, weight, y, False, gated=True)
    else:
        products.product(x, Linear(torch.empty(0), None, weight), both)
        if gated:
            gate(both, y)
