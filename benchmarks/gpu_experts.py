"""The MLP of layers with experts as Qwen3-30B-A3B and Mixtral-8x7B have them, beside what must be read for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton

from benchmarks.gpu_quantised import integers_of
from benchmarks.gpu_time import DEVICE, KIND, time_us
from serve_app.engine.block import Block, Integers, Linear, Router
from serve_app.engine.gpu.experts import ExpertSpace, _tile_of, experts_product
from serve_app.engine.gpu.kernels.experts import add_up, grouped_product
from serve_app.engine.gpu.kernels.route import most_tiles, route, sort_pairs

MODELS = {"qwen3_30b": (2048, 768, 128, 8), "mixtral_8x7b": (4096, 14336, 8, 2)}  # hidden, inner, experts, of a row
ROWS = (1, 2, 8, 32, 64, 128, 256, 2048, 8192)
# block_n, block_k, warps, stages
VARIANTS = [(64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4)]


FORMS = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}  # bits of a weight


def experts(block: Block, quick: bool) -> dict[str, Any]:
    """Microseconds of a layer's experts as the engine takes them, and of their parts. block: any, for all else."""
    out: dict[str, Any] = {}
    for name, (hidden, inner, n, top) in MODELS.items():
        router = Router(Linear(torch.randn((n, hidden), device=DEVICE, dtype=KIND) / 30, None), top, True, True)
        for form, rows in ((form, rows) for form in FORMS for rows in ROWS):
            if rows == ROWS[0]:
                # Two layers in turn: one of them alone would stay in the cache where few experts are read.
                blocks: list[Block] = []
                for _ in range(2):
                    gate_up, down = _matrix(n, 2 * inner, hidden, form), _matrix(n, hidden, inner, form)
                    blocks.append(replace(block, router=router, gate_up=gate_up, down=down))
            space = ExpertSpace(rows, blocks, hidden, torch.device(DEVICE), KIND)
            x = torch.randn((rows, hidden), device=DEVICE, dtype=KIND)
            y = torch.empty_like(x)
            us = time_us([lambda b=b, x=x, y=y, s=space: experts_product(x, b, s, y) for b in blocks * 2])
            reached = len(torch.unique(space.ids[: rows * top]))
            n_bytes = round(reached * 3 * hidden * inner * FORMS[form] / 8)
            key = f"{name}_{form}_{rows}"
            out[f"{key}_us"], out[f"{key}_GB_s"] = round(us, 1), round(n_bytes / us / 1e3)
            out[f"{key}_TFLOPS"] = round(rows * top * 6 * hidden * inner / us / 1e6, 1)
            line = f"{us:.1f} us, {reached} experts, {n_bytes / us / 1e3:.0f} GB/s, {out[f'{key}_TFLOPS']} TFLOPS"
            if rows > 1:
                parts = _parts(blocks[0], space, x, y, quick)
                out |= {f"{key}_{part}": value for part, value in parts.items()}
                line += f" | {parts}"
            print(key, line, flush=True)
    return out


def _matrix(n: int, n_out: int, width: int, form: str) -> Linear:
    """Random matrices of n experts."""
    if form == "bf16":
        return Linear(torch.randn((n, n_out, width), device=DEVICE, dtype=KIND) / 30, None)
    found = integers_of(n * n_out, width, form == "int4")
    stored, scales = (t.view(n, n_out, -1) for t in (found.stored, found.scales))
    return Linear(torch.empty(0, device=DEVICE), None, Integers(stored, scales))


def _parts(block: Block, space: ExpertSpace, x: torch.Tensor, y: torch.Tensor, quick: bool) -> dict[str, Any]:
    router, (rows, hidden) = block.router, x.shape
    assert router is not None
    n, top, inner = router.n_experts, router.top, block.down.shape[1]
    pairs, tile = rows * top, _tile_of(rows * top / router.n_experts)
    logits = space.logits[: rows * n].view(rows, n)
    ids, weights = space.ids[:pairs].view(rows, top), space.weights[:pairs].view(rows, top)
    mid, parts = space.inner[: pairs * inner].view(pairs, inner), space.parts[: pairs * hidden].view(pairs, hidden)
    n_tiles = most_tiles(pairs, n, tile)

    def sort() -> None:
        route(logits, ids, weights, normalised=True, rounded=True)
        sort_pairs(ids, n, tile, counts=space.counts, order=space.order, tiles=space.tiles)

    out: dict[str, Any] = {"sort_us": round(time_us([sort] * 4), 1)}
    out["add_us"] = round(time_us([lambda: add_up(parts, weights, y)] * 4), 1)
    for part, source, weight, to, gated in (
        ("up", x, block.gate_up, mid, True),
        ("down", mid, block.down, parts, False),
    ):
        best = []
        for block_n, block_k, warps, stages in VARIANTS[:1] if quick else VARIANTS:
            call = lambda: grouped_product(
                source, weight, to, space.order, space.tiles, n_tiles, top, gated=gated,
                block_m=tile, block_n=block_n, block_k=block_k, warps=warps, stages=stages,
            )  # fmt: skip
            try:
                best.append((round(time_us([call] * 2), 1), block_n, block_k, warps, stages))
            except triton.runtime.errors.OutOfResources:
                pass
        out[part] = sorted(best)[:2]
    return out
