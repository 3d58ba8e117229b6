"""Weights of small integers on the GPU engine: every kernel computes with the shard's values, for few rows and many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.block import Integers
from serve_app.engine.engines import TORCH
from serve_app.engine.gpu import products
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.kernels.quantised_product import halved, look_up, quantised_product, widen
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.torch_engine import TorchEngine
from shard_tools.checkpoint.quantise import dequantised, quantised
from shard_tools.choice import Choice
from shard_tools.quantised import Scheme
from shard_tools.shard_file import Dtype
from tests.engine_steps import MAX_SEQUENCES, N_PAGES, PAGE, STEPS, Step, published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 192  # three groups of 32 in each half of a row: no power of two
SHAPES = {1: dict(block_m=1, block_n=2, block_k=64), 5: dict(block_m=16, block_n=32, block_k=64), 70: {}}


def weight_of(n: int, dtype: Dtype) -> tuple[Integers, Tensor]:
    """As the kernels read it, and its values in float64."""
    weight = torch.randn((n, WIDTH), generator=torch.Generator().manual_seed(n))
    stored, scales = quantised(weight, dtype)
    values = dequantised(stored, scales).double().to(DEVICE)
    stored = halved(stored) if dtype == "uint8" else stored
    return Integers(stored.to(DEVICE), scales.to(DEVICE)), values


def rows_of(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((n, WIDTH), generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor, bound: float = 2e-3) -> None:
    assert torch.isfinite(found).all()
    assert (found.double() - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("rows", list(SHAPES))
@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_products_are_those_of_the_shard_s_values(dtype: Dtype, rows: int) -> None:
    """With a bias, which a product may have, and gated, as an MLP's; whichever kernel takes the rows."""
    weight, values = weight_of(80, dtype)
    x, bias = rows_of(rows), torch.linspace(-1, 1, 80, device=DEVICE)
    out, half = torch.empty((rows, 80), device=DEVICE), torch.empty((rows, 40), device=DEVICE)
    quantised_product(x, weight, out, bias=bias, **SHAPES[rows])
    plain = x.double() @ values.T
    close(out, plain + bias)
    quantised_product(x, weight, half, gated=True, **SHAPES[rows])
    close(half, torch.nn.functional.silu(plain[:, :40]) * plain[:, 40:])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_a_widened_copy_holds_the_same_values(dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of very many rows are multiplied with; not in float16, where integers could add up to infinity."""
    weight, values = weight_of(48, dtype)
    wide = torch.empty((48, WIDTH), device=DEVICE, dtype=torch.float16)
    widen(weight, wide)
    scales = weight.scales.double() if dtype != "uint8" else 1.0
    assert torch.equal(wide.double() * scales, values)
    monkeypatch.setattr(products, "WIDENED_FROM", 4)
    x, out = rows_of(5), torch.empty((5, 48), device=DEVICE)
    products.product(x, products.Linear(torch.empty(0), torch.ones(48, device=DEVICE), weight), out)
    close(out, x.double() @ values.T + 1)
    small = torch.full((5, WIDTH), 600.0, device=DEVICE, dtype=torch.float16)
    out = torch.empty((5, 48), device=DEVICE, dtype=torch.float16)
    products.product(small, products.Linear(torch.empty(0), None, weight), out)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_an_embedding_s_rows_are_looked_up(dtype: Dtype) -> None:
    weight, values = weight_of(32, dtype)
    out, ids = torch.empty((3, WIDTH), device=DEVICE), torch.tensor([31, 0, 7], dtype=torch.int32, device=DEVICE)
    look_up(ids, weight, out)
    assert torch.equal(out.double(), values[ids.long()])


@pytest.mark.parametrize(
    ("scheme", "deterministic", "steps"),
    [
        ("int8", False, STEPS[:1]),
        *(pytest.param("int8", fixed, STEPS[:4], marks=pytest.mark.slow) for fixed in (False, True)),
        pytest.param("fp8", False, STEPS[:4], marks=pytest.mark.slow),
        *(pytest.param("int4", fixed, STEPS[:4], marks=pytest.mark.slow) for fixed in (False, True)),
    ],
)
def test_a_quantised_model_equals_the_plain_engine(
    scheme: Scheme, deterministic: bool, steps: list[Step], tmp_path: Path
) -> None:
    """Tokens are equal and rows within rounding of float32; what it holds are integers, which its profile says."""
    store, manifest = published(tmp_path, "qwen3", scheme, tied=True)
    plain, fused = (
        load_engine(store, manifest, 0, 2, LoadOptions(DEVICE, "float32", PAGE, None, engine, fixed))
        for engine, fixed in ((TORCH, False), (Choice("gpu"), deterministic))
    )
    assert isinstance(plain, TorchEngine) and isinstance(fused, GpuEngine)
    assert fused.profile.parameter_bytes < 0.35 * plain.profile.parameter_bytes
    for engine in (plain, fused):
        engine.reserve(N_PAGES, MAX_SEQUENCES)
    for plan, rows in steps:
        wanted, found = plain.run(plan, rows), fused.run(plan, rows)
        assert found.tokens == wanted.tokens
        expected, got = (np.frombuffer(out.hidden, "<f4") for out in (wanted, found))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(np.abs(expected).max(initial=0), 1))
    logits = [engine.logits_of(found.hidden).cpu().double() for engine in (plain, fused)]
    close(logits[1], logits[0])
