"""Each kernel of the GPU engine at the shapes of Qwen3-0.6B and Llama-3-8B, beside what PyTorch's libraries do.

    python3 -m benchmarks.gpu_kernels [--quick] [--only attention layers quantised moe attention_fp8]

Times are of a CUDA graph that calls the kernel many times on rotating inputs (nothing stays in the cache that would not
in a model), median of several replays. GB/s counts what must be read once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_experts import experts
from benchmarks.gpu_quantised import quantised
from benchmarks.gpu_time import DEVICE, KIND, time_us
from benchmarks.report import Result, save
from serve_app.engine.block import Block, Linear, Norm
from serve_app.engine.gpu.attend import DecodeAttention
from serve_app.engine.gpu.forward import Pages, Space, run_layers
from serve_app.engine.gpu.kernels import decode_attention, early_launch, skinny_product
from serve_app.engine.gpu.kernels.decode_attention import ChunkSpace, list_chunks
from serve_app.engine.gpu.kernels.norm import rms_norm
from serve_app.engine.gpu.kernels.sampler import SamplerSpace, sample


def bandwidth() -> dict[str, Any]:
    """The two ceilings."""
    big = torch.randn(1 << 29, device=DEVICE, dtype=KIND)
    other = torch.empty_like(big)
    copy = time_us([lambda: other.copy_(big)] * 4)
    read = time_us([lambda: big.view(torch.int32).max()] * 4)
    return {"copy_GB_s": round(2 * big.nbytes / copy / 1e3), "read_by_max_GB_s": round(big.nbytes / read / 1e3)}


# Rows of a step and their contexts: as the nano-vllm workload has them early, in the middle and late, and even ones.
CONTEXTS = {
    "0.6b_256": (16, 8, torch.randint(100, 1300, (234,))),
    "0.6b_158": (16, 8, torch.randint(300, 1600, (158,))),
    "0.6b_95": (16, 8, torch.randint(500, 1900, (95,))),
    "0.6b_37": (16, 8, torch.randint(900, 2000, (37,))),
    "8b_256": (32, 8, torch.full((256,), 193)),
    "8b_32": (32, 8, torch.full((32,), 193)),
    "8b_1": (32, 8, torch.full((1,), 193)),
    "8b_1_long": (32, 8, torch.full((1,), 8000)),
}
# block, warps, stages, programs on each multiprocessor
VARIANTS = [
    (32, 1, 2, 6), (32, 2, 2, 6), (64, 4, 2, 3), (64, 4, 3, 2), (16, 1, 3, 8), (16, 1, 2, 12), (128, 8, 2, 1),
]  # fmt: skip


def attention(quick: bool, eight: bool = False) -> dict[str, Any]:
    """eight: pages of 8-bit floats."""
    out: dict[str, Any] = {}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, (heads, kv_heads, lengths) in CONTEXTS.items():
        rows, page, dim = len(lengths), 16, 128
        n_bytes = int(lengths.sum()) * kv_heads * 2 * (dim + 4 if eight else 2 * dim)
        copies = max(1, min(8, (400 << 20) // n_bytes))
        per = int(lengths.max()) // page + 1
        caches = [
            [
                torch.randn((rows * per, kv_heads, page, dim), device=DEVICE, dtype=KIND).to(
                    torch.float8_e4m3fn if eight else KIND
                )
                for _ in range(2)
            ]
            for _ in range(copies)
        ]
        table = torch.randperm(rows * per).view(rows, per).int().to(DEVICE)
        slots, dev_lengths = torch.arange(rows).int().to(DEVICE), lengths.int().to(DEVICE)
        scales = torch.rand((2, rows * per, kv_heads, page), device=DEVICE) if eight else None
        q = torch.randn((rows, heads, dim), device=DEVICE, dtype=KIND)
        o = torch.empty_like(q)
        results = []
        for block, warps, stages, programs in VARIANTS[:1] if quick else VARIANTS:
            space = ChunkSpace.of(rows, heads, kv_heads, dim, torch.device(DEVICE))
            most = max(1, 8 * programs * processors // kv_heads)
            if most > space.most:
                space = ChunkSpace.of(max(most, rows), heads, kv_heads, dim, torch.device(DEVICE))
            space = replace(space, programs=programs * processors, most=most, few=3 * most // 8)
            list_chunks(slots, dev_lengths, space)
            calls = [
                lambda c=c, space=space, block=block, warps=warps, stages=stages: decode_attention.decode_attention(
                    q, c[0], c[1], table, dev_lengths, out=o, space=space, scale=dim**-0.5, scales=scales,
                    block=block, warps=warps, stages=stages,
                )
                for c in caches * max(1, 8 // copies)
            ]  # fmt: skip
            results.append((time_us(calls), block, warps, stages, programs))
        results.sort()
        out[name] = [
            f"{us:.1f} us {n_bytes / us / 1e3:.0f} GB/s block {b} warps {w} stages {s} programs {p}"
            for us, b, w, s, p in results[:4]
        ]
        print(name, out[name], flush=True)
        del caches
    return out


def random_block(hidden: int, inner: int, heads: int, kv_heads: int, dim: int, has_norms: bool) -> Block:
    """has_norms: of queries and keys."""

    def weight(n: int, k: int) -> Linear:
        return Linear(torch.randn((n, k), device=DEVICE, dtype=KIND) * 0.02, None)

    def ones(n: int) -> Norm:
        return Norm(torch.ones(n, device=DEVICE, dtype=KIND), 1e-6, False)

    angles = torch.rand((4096, dim // 2), device=DEVICE)
    return Block(
        heads=heads, kv_heads=kv_heads, dim=dim, scale=dim**-0.5, softcap=None, window=None, sinks=None,
        cos=angles.cos(), sin=angles.sin(), norm_in=ones(hidden), qkv=weight((heads + 2 * kv_heads) * dim, hidden),
        q_norm=ones(dim) if has_norms else None, k_norm=ones(dim) if has_norms else None,
        out=weight(hidden, heads * dim), after_attention=None, norm_mid=ones(hidden),
        gate_up=weight(2 * inner, hidden), down=weight(hidden, inner), after_mlp=None, activation="silu",
    )  # fmt: skip


def layers() -> dict[str, Any]:
    """Whole layers in a graph, as the engine runs them, beside what must be read for them."""
    out: dict[str, Any] = {}
    for name, hidden, inner, heads, n_layers in (("0.6b", 1024, 3072, 16, 12), ("8b", 4096, 14336, 32, 4)):
        kv_heads, dim, device = 8, 128, torch.device(DEVICE)

        blocks = [random_block(hidden, inner, heads, kv_heads, dim, name == "0.6b") for _ in range(n_layers)]
        n_bytes = sum(
            2 * t.numel() for b in blocks for t in (b.qkv.weight, b.out.weight, b.gate_up.weight, b.down.weight)
        )
        for rows, context in ((1, 193), (8, 193), (32, 193), (64, 193), (128, 193), (256, 193)):
            per = context // 16 + 1
            pages, space = Pages(blocks, rows * per, 16, device, KIND), Space(rows, blocks, hidden, device, KIND)
            space.residual.normal_()
            table = torch.arange(rows * per, device=DEVICE, dtype=torch.int32).view(rows, per)
            slots = torch.arange(rows, device=DEVICE, dtype=torch.int32)
            positions = torch.full((rows,), context - 1, device=DEVICE, dtype=torch.int32)
            decode = DecodeAttention(blocks, rows, device)
            attend = decode.bind(table, slots, positions + 1)
            us = time_us([
                lambda: run_layers(
                    blocks, pages, space, rows, page_table=table, slots=slots, positions=positions, attend=attend,
                    final=None,
                )
            ] * 2)  # fmt: skip
            whole = n_bytes + rows * context * kv_heads * dim * 4 * n_layers
            out[f"{name}_{rows}_rows_us_a_layer"] = round(us / n_layers, 2)
            out[f"{name}_{rows}_rows_GB_s"] = round(whole / us / 1e3)
            print(name, rows, f"{us / n_layers:.2f} us a layer, {whole / us / 1e3:.0f} GB/s", flush=True)
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
                        lambda w=w: skinny_product.skinny_product(
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


DEFAULT = ["attention", "layers", "others", "products"]
ASKED = ["attention_fp8", "moe", "quantised"]  # minutes each, most of it compiling variants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
    parser.add_argument("--only", nargs="+", choices=[*DEFAULT, *ASKED], default=DEFAULT)
    parser.add_argument("--no-early", action="store_true", help="no kernel starts before the one before it has ended")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    if a.no_early:
        early_launch._supported = lambda: False
    figures: dict[str, Any] = {"early_launch": not a.no_early, **bandwidth()}
    print(figures, flush=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": lambda: attention(a.quick),
        "layers": layers,
        "others": others,
        "products": lambda: products(a.quick),
        "attention_fp8": lambda: attention(a.quick, eight=True),
        "moe": lambda: experts(random_block(64, 64, 4, 2, 64, False), a.quick),
        "quantised": lambda: quantised(a.quick),
    }
    figures |= {name: part() for name, part in parts.items() if name in a.only}
    save(Result("gpu_kernels", figures), a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
