"""A mixture of experts is routed, sorted and added up on the device as transformers computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.block import Block, Integers, Linear, NotFusable, Router, read_block
from serve_app.engine.engines import TORCH
from serve_app.engine.gpu.experts import ExpertSpace, experts_product
from serve_app.engine.gpu.kernels.quantised_product import halved
from serve_app.engine.gpu.kernels.route import most_tiles, pairs_at_a_time, route, sort_pairs
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.torch_engine import TorchEngine
from shard_tools.checkpoint.quantise import dequantised, quantised
from shard_tools.shard_file import Dtype
from tests.engine_steps import PAGE, published

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def ints(*shape: int) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("rows", "n_experts", "top", "tile"), [(1, 4, 2, 16), (3, 6, 3, 16), (150, 5, 2, 64)])
def test_pairs_are_sorted_by_expert_and_every_pair_is_in_one_tile(
    rows: int, n_experts: int, top: int, tile: int
) -> None:
    """Stable, and with nothing in the tiles past the last; several programs sort the larger one."""
    logits = drawn(rows, n_experts)
    ids, weights = ints(rows, top), torch.empty((rows, top), device=DEVICE)
    route(logits, ids, weights, normalised=False, rounded=False)
    wanted = torch.topk(logits.softmax(-1), top)
    assert torch.equal(ids.long(), wanted.indices) and torch.allclose(weights, wanted.values)
    pairs = rows * top
    order, tiles = ints(pairs), ints(most_tiles(pairs, n_experts, tile), 3)
    counts = ints(-(-pairs // pairs_at_a_time(n_experts)) * 8)
    sort_pairs(ids, n_experts, tile, counts=counts, order=order, tiles=tiles)
    assert torch.equal(order.long(), torch.argsort(ids.view(-1), stable=True))
    seen = []
    for expert, begin, n in tiles.tolist():
        assert 0 <= n <= tile
        mine = order[begin : begin + n].tolist()
        assert all(int(ids.view(-1)[pair]) == expert for pair in mine)
        seen += mine
    assert sorted(seen) == list(range(pairs))


def test_a_row_that_is_no_number_goes_to_experts_that_exist() -> None:
    """Its weights are no numbers either, so what comes of it is refused and not believed."""
    ids, weights = ints(1, 2), torch.empty((1, 2), device=DEVICE)
    route(torch.full((1, 3), float("nan"), device=DEVICE), ids, weights, normalised=True, rounded=False)
    assert ids.min() >= 0 and ids.max() < 3 and weights.isnan().all()


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Block:
    """A layer with experts, as it is read off its module."""
    store, manifest = published(tmp_path_factory.mktemp("tiny"), "mixtral")
    plain = load_engine(store, manifest, 0, 1, LoadOptions("cpu", "float32", PAGE, None, TORCH))
    assert isinstance(plain, TorchEngine)
    found = read_block(plain.model.layers[0], plain.model.holder.rotary_emb, 8)
    assert found.router is not None and (found.router.top, found.router.normalised) == (2, True)
    return found


def small(weight: Tensor, dtype: Dtype) -> tuple[Linear, Tensor]:
    """The weight as small numbers, where the kernels read it, and the values that these stand for."""
    stored, scales = quantised(weight.cpu(), dtype)
    values = dequantised(stored, scales).to(DEVICE)
    stored = halved(stored) if dtype == "uint8" else stored
    return Linear(torch.empty(0), None, Integers(stored.to(DEVICE), scales.to(DEVICE))), values


@pytest.mark.parametrize(("rows", "fixed"), [(1, False), (1, True), (5, False), (5, True), (70, False)])
@pytest.mark.parametrize("dtype", [None, "int8", "uint8", "float8_e4m3fn"])
def test_rows_are_the_mixture_of_their_experts(layer: Block, dtype: Dtype | None, rows: int, fixed: bool) -> None:
    """Whichever kernels take them; a row's bits do not depend on the others where tiles are fixed."""
    hidden, inner = (48, 40) if dtype is None else (128, 64)
    router = Router(Linear(drawn(6, hidden) / 7, None), 3, False, False)
    up_values, down_values = drawn(6, 2 * inner, hidden) / 7, drawn(6, hidden, inner) / 6
    gate_up, down = Linear(up_values, None), Linear(down_values, None)
    if dtype is not None:
        (gate_up, up_values), (down, down_values) = small(up_values, dtype), small(down_values, dtype)
    block = replace(layer, gate_up=gate_up, down=down, router=router)
    x, out = drawn(70, hidden)[:rows].contiguous(), torch.empty((rows, hidden), device=DEVICE)
    space = ExpertSpace(70, [block], hidden, DEVICE, torch.float32)
    experts_product(x, block, space, out, fixed)
    shares = torch.topk((x @ router.linear.weight.T).softmax(-1), 3)
    wanted = torch.zeros_like(x)
    for row in range(rows):
        for weight, expert in zip(shares.values[row], shares.indices[row], strict=True):
            gate, up = (up_values[expert] @ x[row]).chunk(2)
            wanted[row] += weight * (down_values[expert] @ (nn.functional.silu(gate) * up))
    assert (out - wanted).norm() < 2e-3 * wanted.norm()
    if fixed and rows > 1:
        alone = torch.empty((1, hidden), device=DEVICE)
        experts_product(x[2:3].contiguous(), block, space, alone, fixed)
        assert torch.equal(alone[0], out[2])


def test_experts_of_another_kind_are_refused_with_the_reason(tmp_path: Path) -> None:
    """The plain engine serves them."""
    store, manifest = published(tmp_path, "qwen3_moe")
    plain = load_engine(store, manifest, 0, 1, LoadOptions("cpu", "float32", PAGE, None, TORCH))
    assert isinstance(plain, TorchEngine)
    module, rotary = plain.model.layers[0], plain.model.holder.rotary_emb
    module.mlp.gate.forward = lambda x: (None, (x @ module.mlp.gate.weight.T).sigmoid().topk(2).values, None)
    with pytest.raises(NotFusable, match="does not weigh experts by a softmax"):
        read_block(module, rotary, 8)
    module.mlp.shared_expert = nn.Linear(2, 2)
    with pytest.raises(NotFusable, match="has or lacks shared_expert"):
        read_block(module, rotary, 8)
