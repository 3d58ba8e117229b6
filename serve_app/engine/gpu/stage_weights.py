"""The weights of one stage for the GPU engine, each layer checked against the module it was read from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.block import Block, FindIntegers, Integers, Linear
from serve_app.engine.engine import KvDtype
from serve_app.engine.gpu.attend import DecodeAttention, PrefillAttention, tiles_of
from serve_app.engine.gpu.forward import Pages, Space, norm, run_layers
from serve_app.engine.gpu.kernels.quantised_product import halved
from serve_app.engine.gpu.products import head_product
from serve_app.engine.request_table import PlannedSpans
from serve_app.engine.stage_weights import PROMPT, Seen, StageWeights, read_stage, require_layer, require_logits
from serve_app.engine.torch_engine import TorchEngine
from shard_tools.quantised import GROUP


@torch.inference_mode()
def read_weights(
    reference: TorchEngine, page_size: int, integers: FindIntegers = lambda name: None, kv: KvDtype = "auto"
) -> StageWeights:
    """Raises NotFusable, saying what in this model the fused path does not compute.

    Weights that `integers` knows are held as integers alone; the plain engine's own go with it.
    """
    weights, seen = read_stage(reference, page_size, integers)
    weights = _with_integers(weights)
    for i, (block, layer_seen) in enumerate(zip(weights.blocks, seen, strict=True)):
        _check_layer(i, block, layer_seen, page_size)
        if kv == "fp8":
            _check_layer(i, block, layer_seen, page_size, torch.float8_e4m3fn)
    if weights.head is not None:
        rows = seen[-1].outputs[0]
        require_logits(rows.dtype, reference.model.logits(rows), logits_of(rows, weights))
    return weights


def _check_layer(i: int, block: Block, seen: Seen, page_size: int, kept: torch.dtype | None = None) -> None:
    """kept: what pages hold, where that is not what rows are; then only a blunder is found."""
    device, dtype = seen.inputs[0].device, seen.inputs[0].dtype
    n_pages = -(-(PROMPT + 1) // page_size)
    space = Space(PROMPT, [block], seen.inputs[0].shape[1], device, dtype)
    pages = Pages([block], n_pages, page_size, device, kept or dtype)
    page_table = torch.arange(n_pages, dtype=torch.int32, device=device)[None]
    decode = DecodeAttention([block], 1, device)
    for start, inputs, wanted in zip((0, PROMPT), seen.inputs, seen.outputs, strict=True):
        n = len(inputs)
        slots = torch.zeros(n, dtype=torch.int32, device=device)
        positions = torch.arange(start, start + n, dtype=torch.int32, device=device)
        one = decode.bind(page_table, slots[:1], positions[:1] + 1)
        tiles = tiles_of([block], _one_span(start, n), np.zeros(1, np.int32), 0)
        on_device = [torch.from_numpy(t).view(-1, 4).to(device) for t in tiles]
        attend = one if n == 1 else PrefillAttention(one, 0, page_table, on_device, [block])
        space.residual[:n] = inputs
        run_layers(
            [block], pages, space, n, page_table=page_table, slots=slots, positions=positions, attend=attend, final=None
        )
        require_layer(i, inputs, wanted, space.residual[:n], coarse=kept is not None)


def _one_span(start: int, n: int) -> PlannedSpans:
    one = np.ones(1, np.int32)
    none = np.zeros(0, np.int32)
    return PlannedSpans(one * 0, one * start, one * n, one != 1, none, none, one * 0)


def logits_of(rows: Tensor, weights: StageWeights, fixed: bool = False) -> Tensor:
    """float32 [rows, vocab] of rows that left the last layer."""
    assert weights.final is not None and weights.head is not None
    x = torch.empty_like(rows)
    logits = torch.empty((len(rows), weights.head.n_out), device=rows.device, dtype=rows.dtype)
    norm(rows, weights.final, x)
    head_product(x, weights.head, logits, fixed)
    found = logits.float()
    cap = weights.logit_cap
    return found if cap is None else torch.tanh(found.div_(cap)).mul_(cap)


def _with_integers(weights: StageWeights) -> StageWeights:
    """The weights, of which those that were computed from integers are only those, as the kernels read them."""
    done: dict[int, Integers] = {}  # a tied head's are the embedding's

    def laid_out(linear: Linear) -> Linear:
        found = linear.integers
        if found is None:
            return linear
        if not _has_layout(linear):
            return replace(linear, integers=None)
        four = found.stored.dtype == torch.uint8
        if id(found) not in done:
            stored, scales = (t.to(weights.device).contiguous() for t in (found.stored, found.scales))
            done[id(found)] = Integers(halved(stored) if four else stored, scales)
        return Linear(linear.weight.new_empty(0), linear.bias, done[id(found)])

    def looked_up(table: Linear) -> Linear:
        is_rows = table.integers is not None and table.integers.stored.dtype != torch.uint8
        return laid_out(table) if is_rows else replace(table, integers=None)

    blocks = tuple(
        replace(
            block,
            qkv=laid_out(block.qkv),
            out=laid_out(block.out),
            gate_up=laid_out(block.gate_up),
            down=laid_out(block.down),
        )
        for block in map(_even, weights.blocks)
    )
    embedding = None if weights.embedding is None else looked_up(weights.embedding)
    head = None if weights.head is None else laid_out(weights.head)
    return replace(weights, blocks=blocks, embedding=embedding, head=head)


def _has_layout(linear: Linear) -> bool:
    """Whether the kernels can read the integers of this matrix: each half of a four-bit row holds whole groups."""
    found = linear.integers
    return found is not None and (found.stored.dtype != torch.uint8 or linear.shape[1] % (2 * GROUP) == 0)


def _even(block: Block) -> Block:
    """The block, whose experts are either small on their way up and down or on neither: one kernel takes both."""
    if block.router is None or (_has_layout(block.gate_up) and _has_layout(block.down)):
        return block
    return replace(block, gate_up=replace(block.gate_up, integers=None), down=replace(block.down, integers=None))
