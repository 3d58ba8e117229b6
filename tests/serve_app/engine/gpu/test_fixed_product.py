"""With fixed tiles a row has the same bits in any company: a product, a layer; the engines' contract asks a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.kernels.fixed_product import fixed_product
from serve_app.engine.load import LoadOptions, load_engine
from shard_tools.choice import Choice
from tests.engine_steps import GREEDY, MAX_SEQUENCES, N_PAGES, PAGE, numpy_is_even, plan_of, published

pytestmark = pytest.mark.slow  # Triton's interpreter takes seconds for a step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_a_row_s_product_has_the_same_bits_in_any_place_and_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in ((80, 100), (90, 100), (90,))
    )
    whole = torch.empty((80, 90), dtype=dtype, device=DEVICE)
    fixed_product(x, weight, whole, bias)
    assert torch.allclose(whole.double(), x.double() @ weight.double().T + bias.double(), rtol=0.02, atol=0.1)
    for first, n in ((0, 1), (79, 1), (3, 17), (16, 64), (15, 65)):
        found = torch.empty((n, 90), dtype=dtype, device=DEVICE)
        fixed_product(x[first : first + n].contiguous(), weight, found, bias)
        expected = whole[first : first + n]
        assert (
            torch.equal(found, expected)
            if DEVICE == "cuda" or numpy_is_even()
            else torch.allclose(found, expected, rtol=1e-3, atol=1e-2)
        )


def test_a_layer_s_rows_have_the_same_bits_in_any_company(tmp_path: Path) -> None:
    """Whole and alone; behind a row of another prompt; as a decode row beside another."""
    store, manifest = published(tmp_path)
    engine = load_engine(store, manifest, 1, 2, LoadOptions(DEVICE, "float32", PAGE, None, Choice("gpu"), True))
    assert isinstance(engine, GpuEngine) and engine.profile.description.endswith("fixed tiles")
    engine.reserve(N_PAGES, MAX_SEQUENCES)
    rows = np.random.default_rng(0).standard_normal((5, manifest.hidden_size)).astype("<f4")
    width = manifest.hidden_size * 4

    def run(spans: list[tuple[int, int, int, list[int], int]], opens: list[int], *which: int) -> bytes:
        data = memoryview(rows[list(which)].tobytes())
        return bytes(engine.run(plan_of(spans, dict.fromkeys(opens, GREEDY)), data).hidden)

    alone = run([(1, 0, 3, [4], 0)], [1], 0, 1, 2)
    prompt = run([(2, 0, 1, [7], 0), (3, 0, 2, [0], 0)], [2, 3], 3, 0, 1)
    decoded = run([(3, 2, 1, [], 1), (2, 1, 1, [], 1)], [], 2, 4)
    assert prompt[width:] + decoded[:width] == alone
