"""Each kernel of the GPU engine at the shapes of Qwen3-0.6B and Llama-3-8B, beside what PyTorch's libraries do.

    python3 -m benchmarks.gpu_kernels [--quick]

Times are of a CUDA graph that calls the kernel many times on rotating inputs (nothing stays in the cache that would not
in a model), median of several replays. GB/s counts what must be read once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.report import Result, save
from serve_app.engine.gpu.kernels.decode_attention import decode_attention
from serve_app.engine.gpu.kernels.norm import rms_norm
from serve_app.engine.gpu.kernels.sampler import SamplerSpace, sample
from serve_app.engine.gpu.kernels.skinny_product import skinny_product

DEVICE = "cuda"
KIND = torch.bfloat16


def time_us(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Microseconds of one call, median over replays of a graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def bandwidth() -> dict[str, Any]:
    """The two ceilings."""
    big = torch.randn(1 << 29, device=DEVICE, dtype=KIND)
    other = torch.empty_like(big)
    copy = time_us([lambda: other.copy_(big)] * 4)
    read = time_us([lambda: big.view(torch.int32).max()] * 4)
    return {"copy_GB_s": round(2 * big.nbytes / copy / 1e3), "read_by_max_GB_s": round(big.nbytes / read / 1e3)}


def attention(quick: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    cases = {
        "0.6b_256x904": (16, 8, torch.randint(100, 1708, (256,))),
        "8b_256x193": (32, 8, torch.full((256,), 193)),
        "8b_32x193": (32, 8, torch.full((32,), 193)),
        "8b_1x193": (32, 8, torch.full((1,), 193)),
        "8b_1x8000": (32, 8, torch.full((1,), 8000)),
    }
    for name, (heads, kv_heads, lengths) in cases.items():
        rows, page, dim = len(lengths), 16, 128
        n_bytes = int(lengths.sum()) * kv_heads * dim * 4
        copies = max(1, min(8, (400 << 20) // n_bytes))
        per = int(lengths.max()) // page + 1
        caches = [
            [torch.randn((rows * per, kv_heads, page, dim), device=DEVICE, dtype=KIND) for _ in range(2)]
            for _ in range(copies)
        ]
        table = torch.randperm(rows * per).view(rows, per).int().to(DEVICE)
        slots, dev_lengths = torch.arange(rows).int().to(DEVICE), lengths.int().to(DEVICE)
        q = torch.randn((rows, heads, dim), device=DEVICE, dtype=KIND)
        o = torch.empty_like(q)
        results = []
        for parts in (1, 2, 4, 8, 16, 32):
            if (rows == 256 and parts > 8) or (rows == 1 and parts == 2):
                continue
            space = torch.empty((rows, heads, parts, dim), device=DEVICE)
            stat = torch.empty((rows, heads, parts, 2), device=DEVICE)
            for block, warps, stages in (
                [(64, 4, 3)]
                if quick
                else [
                    (32, 2, 3),
                    (32, 2, 5),
                    (64, 2, 3),
                    (64, 4, 2),
                    (64, 4, 3),
                    (64, 4, 4),
                    (128, 4, 2),
                    (128, 4, 3),
                    (128, 8, 3),
                ]
            ):
                calls = [
                    lambda c=c: decode_attention(
                        q, c[0], c[1], table, slots, dev_lengths, out=o, part_out=space, part_stat=stat,
                        parts=parts, scale=dim**-0.5, block=block, warps=warps, stages=stages,
                    )
                    for c in caches * max(1, 8 // copies)
                ]  # fmt: skip
                results.append((time_us(calls), parts, block, warps, stages))
        results.sort()
        out[name] = [
            f"{us:.1f} us {n_bytes / us / 1e3:.0f} GB/s parts {p} block {b} warps {w} stages {s}"
            for us, p, b, w, s in results[:6]
        ]
        print(name, out[name], flush=True)
        del caches
    return out


SHAPES = {
    "8b_qkv": (6144, 4096, False),
    "8b_o": (4096, 4096, False),
    "8b_gate_up": (28672, 4096, True),
    "8b_down": (4096, 14336, False),
    "8b_head": (128256, 4096, False),
    "0.6b_qkv": (4096, 1024, False),
    "0.6b_o": (1024, 2048, False),
    "0.6b_gate_up": (6144, 1024, True),
    "0.6b_down": (1024, 3072, False),
    "0.6b_head": (151936, 1024, False),
}


def products(quick: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (n, k, gated) in SHAPES.items():
        copies = max(1, min(12, (600 << 20) // (n * k * 2)))
        weights = [torch.randn((n, k), device=DEVICE, dtype=KIND) for _ in range(copies)]
        turns = weights * max(1, 8 // copies)
        for rows in (1, 8, 32, 64, 256):
            x = torch.randn((rows, k), device=DEVICE, dtype=KIND)
            y = torch.empty((rows, n), device=DEVICE, dtype=KIND)
            blas = time_us([lambda w=w: torch.mm(x, w.t(), out=y) for w in turns])
            line = f"cublas {blas:.1f} us {n * k * 2 / blas / 1e3:.0f} GB/s"
            best: list[Any] = []
            if rows == 1:
                tries = [
                    (8, 512, 4, 3),
                    (16, 512, 4, 3),
                    (16, 256, 4, 4),
                    (8, 1024, 8, 2),
                    (16, 1024, 8, 2),
                    (32, 256, 4, 3),
                    (4, 1024, 4, 3),
                    (2, 2048, 4, 2),
                ]
            elif rows <= 64:
                tries = [
                    (16, 256, 4, 4),
                    (32, 128, 4, 4),
                    (32, 256, 4, 3),
                    (64, 128, 4, 4),
                    (64, 64, 4, 5),
                    (32, 128, 8, 4),
                    (128, 64, 8, 4),
                ]
            else:
                tries = []
            for block_n, block_k, warps, stages in tries[:2] if quick else tries:
                o = y[:, : n // 2].contiguous() if gated else y
                try:
                    us = time_us([
                        lambda w=w: skinny_product(
                            x, w, o, gated=gated, block_n=block_n, block_k=block_k, warps=warps, stages=stages
                        )
                        for w in turns
                    ])  # fmt: skip
                    best.append((us, block_n, block_k, warps, stages))
                except triton.runtime.errors.OutOfResources:
                    pass
            if best:
                best.sort()
                us = best[0][0]
                line += (
                    f" | ours {us:.1f} us {n * k * 2 / us / 1e3:.0f} GB/s {best[0][1:]}; {best[1][0]:.1f} {best[1][1:]}"
                )
            out[f"{name}_{rows}"] = line
            print(name, rows, line, flush=True)
        del weights, turns
    return out


def others() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for rows in (1, 256):
        n_vocab = 151936
        logits = torch.randn((rows, n_vocab), device=DEVICE, dtype=KIND)
        slots = torch.arange(rows, device=DEVICE).int()
        for name, k, p in (("temperature", 0, 10**6), ("top_p", 0, 950_000), ("top_k", 50, 10**6)):
            fields = dict(
                temperature_micro=torch.full((rows,), 600_000, device=DEVICE).int(),
                top_k=torch.full((rows,), k, device=DEVICE).int(),
                top_p_micro=torch.full((rows,), p, device=DEVICE).int(),
                keys=torch.randint(-(2**31), 2**31, (rows, 2), device=DEVICE).int(),
                tokens=torch.empty(rows, device=DEVICE, dtype=torch.int32),
                last_tokens=torch.empty(rows, device=DEVICE, dtype=torch.int32),
                space=SamplerSpace(rows, n_vocab, torch.device(DEVICE)),
            )
            us = time_us([lambda: sample(logits, slots, slots, **fields)] * 4)
            out[f"sample_{name}_{rows}_us"] = round(us, 1)
        x, r = (torch.randn((rows, 4096), device=DEVICE, dtype=KIND) for _ in range(2))
        w, o = torch.randn(4096, device=DEVICE, dtype=KIND), torch.empty_like(x)
        out[f"add_norm_{rows}_us"] = round(time_us([lambda: rms_norm(x, w, 1e-6, o, r)] * 16), 2)
    print(out, flush=True)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    figures = bandwidth()
    print(figures, flush=True)
    figures |= {"attention": attention(a.quick), "others": others(), "products": products(a.quick)}
    save(Result("gpu_kernels", figures), a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
