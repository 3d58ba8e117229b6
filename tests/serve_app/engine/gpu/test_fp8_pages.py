"""Keys and values as 8-bit floats: what is written is rounded to nearest, and prompts and decode rows read the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.engines import TORCH
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.kernels.decode_attention import ChunkSpace, decode_attention, list_chunks
from serve_app.engine.gpu.kernels.prefill_attention import prefill_attention
from serve_app.engine.gpu.kernels.rope import rotate_and_write
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.errors import ConfigError
from shard_tools.choice import Choice
from tests.engine_steps import GREEDY, MAX_SEQUENCES, N_PAGES, PAGE, ids, plan_of, published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 32, 23
FP8 = torch.float8_e4m3fn
OPTIONS = LoadOptions(DEVICE, "float32", PAGE, None, Choice("gpu"), kv_dtype="fp8")  # type: ignore[arg-type]


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers and float32 scales of rows [..., dim], by torch."""
    scale = rows.abs().amax(-1, keepdim=True) / 448
    numbers = rows / torch.where(scale == 0, 1.0, scale)
    return torch.where(numbers.abs() < 2**-6 - 2**-11, 0.0, numbers.to(FP8).float()), scale


class Written:
    """One sequence of LENGTH positions, not rotated, in pages."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        width = (HEADS + 2 * KV_HEADS) * DIM
        # Widely different sizes: 448 for one element must leave something of the others.
        sizes = torch.logspace(-2, 2, width)[torch.randperm(width, generator=generator)]
        self.qkv = (torch.randn((LENGTH, width), generator=generator) * sizes).to(DEVICE)
        self.qkv[3, HEADS * DIM :] = 0.0
        n_pages = -(-LENGTH // PAGE)
        self.table = torch.randperm(n_pages, generator=generator)[None].int().to(DEVICE)
        self.keys, self.values = torch.zeros((2, n_pages, KV_HEADS, PAGE, DIM), dtype=torch.uint8, device=DEVICE).view(
            FP8
        )
        self.scales = torch.zeros((2, n_pages, KV_HEADS, PAGE), device=DEVICE)
        self.q = torch.zeros((LENGTH, HEADS, DIM), device=DEVICE)
        none = torch.zeros((LENGTH, DIM // 2), device=DEVICE)
        slots, positions = torch.zeros(LENGTH, device=DEVICE).int(), torch.arange(LENGTH, device=DEVICE).int()
        rotate_and_write(
            self.qkv, self.q, self.keys, self.values, none + 1, none, self.table, slots, positions, scales=self.scales
        )

    def read(self, which: int) -> Tensor:
        """[kv_heads, LENGTH, dim]: keys (0) or values (1) as the pages have them."""
        cells = (self.keys, self.values)[which].float() * self.scales[which][..., None]
        return cells[self.table[0].long()].transpose(0, 1).reshape(KV_HEADS, -1, DIM)[:, :LENGTH]


@pytest.fixture(scope="module")
def written() -> Written:
    return Written()


def test_rows_are_rounded_to_nearest_at_a_scale_of_their_own(written: Written) -> None:
    """The same bits as torch's rounding; a row of zeros stays one."""
    rows = written.qkv[:, HEADS * DIM :].view(LENGTH, 2, KV_HEADS, DIM)
    for which in (0, 1):
        numbers, scale = rounded(rows[:, which])
        assert torch.equal(written.read(which).transpose(0, 1), numbers * torch.where(scale == 0, 1.0, scale))
        error = (written.read(which).transpose(0, 1) - rows[:, which]).norm() / rows[:, which].norm()
        assert 0.01 < error < 0.04


@pytest.mark.parametrize("window", [None, 9])
def test_decode_rows_and_prompts_read_the_same_values(written: Written, window: int | None) -> None:
    """Both equal plain attention to what the pages hold."""
    q = torch.randn((LENGTH, HEADS, DIM), generator=torch.Generator().manual_seed(1)).to(DEVICE) / 100
    k, v = (written.read(which).double().repeat_interleave(HEADS // KV_HEADS, 0) for which in (0, 1))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
    mine, at = torch.arange(LENGTH, device=DEVICE)[:, None], torch.arange(LENGTH, device=DEVICE)[None]
    seen = (at <= mine) & (at > mine - (window or LENGTH))
    wanted = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)
    how = dict(scale=DIM**-0.5, window=window, scales=written.scales)
    found = torch.zeros_like(q)
    tiles = torch.tensor([[0, 0, 20, 0], [0, 20, LENGTH - 20, 20]], dtype=torch.int32, device=DEVICE)
    prefill_attention(q, written.keys, written.values, written.table, tiles, out=found, **how)  # type: ignore[arg-type]
    assert (found.double() - wanted).norm() < 2e-3 * wanted.norm()
    space = ChunkSpace.of(1, HEADS, KV_HEADS, DIM, torch.device(DEVICE))
    slots, lengths = torch.zeros(1, device=DEVICE).int(), torch.full((1,), LENGTH, device=DEVICE).int()
    list_chunks(slots, lengths, space)
    one = torch.zeros_like(q[:1])
    decode_attention(
        q[-1:].contiguous(),
        written.keys,
        written.values,
        written.table,
        lengths,
        out=one,
        space=space,
        **how,  # type: ignore[arg-type]
    )
    assert (one[0].double() - wanted[-1]).norm() < 2e-3 * wanted[-1].norm()


@pytest.mark.slow
def test_an_engine_says_so_and_stays_close(tmp_path: Path) -> None:
    """What is signed names it; a page takes less; a prompt, then a decode row, are near the plain engine's."""
    store, manifest = published(tmp_path, "qwen3")
    plain = load_engine(store, manifest, 0, 1, replace(OPTIONS, engine=TORCH, kv_dtype="auto"))
    fused = load_engine(store, manifest, 0, 1, OPTIONS)
    assert isinstance(fused, GpuEngine) and fused.profile.description.endswith(", fp8 keys and values")
    assert fused.profile.kv_page_bytes == 2 * 2 * PAGE * (16 + 4)
    steps = [
        (plan_of([(1, 0, 6, [3, 1], 1)], {1: GREEDY}), ids(*range(5, 11))),
        (plan_of([(1, 6, 1, [], 1)]), ids(11)),
    ]
    for engine in (plain, fused):
        engine.reserve(N_PAGES, MAX_SEQUENCES)
    for plan, rows in steps:
        wanted, found = (np.frombuffer(engine.launch(plan, rows).result().hidden, "<f4") for engine in (plain, fused))
        assert 1e-5 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize("engine", ["torch", "cpu", "auto"])
def test_engines_that_know_none_refuse(engine: str, tmp_path: Path) -> None:
    """Rather than compute with other values than were asked for."""
    store, manifest = published(tmp_path)
    options = replace(OPTIONS, device="cpu", engine=Choice(engine))
    with pytest.raises(ConfigError, match="kv_dtype fp8 is of the GPU engine alone"):
        load_engine(store, manifest, 0, 2, options)
