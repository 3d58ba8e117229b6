"""The weights of one stage for the GPU engine, each layer checked against the module it was read from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.block import Block
from serve_app.engine.gpu.attend import DecodeAttention, PrefillAttention, tiles_of
from serve_app.engine.gpu.forward import Pages, Space, head_product, norm, run_layers
from serve_app.engine.request_table import PlannedSpans
from serve_app.engine.stage_weights import PROMPT, Seen, StageWeights, read_stage, require_layer, require_logits
from serve_app.engine.torch_engine import TorchEngine


@torch.inference_mode()
def read_weights(reference: TorchEngine, page_size: int) -> StageWeights:
    """Raises NotFusable, saying what in this model the fused path does not compute."""
    weights, seen = read_stage(reference, page_size)
    for i, (block, layer_seen) in enumerate(zip(weights.blocks, seen, strict=True)):
        _check_layer(i, block, layer_seen, page_size)
    if weights.head is not None:
        _check_head(weights, reference.model, seen[-1].outputs[0])
    return weights


def _check_layer(i: int, block: Block, seen: Seen, page_size: int) -> None:
    device, dtype = seen.inputs[0].device, seen.inputs[0].dtype
    n_pages = -(-(PROMPT + 1) // page_size)
    space = Space(PROMPT, [block], seen.inputs[0].shape[1], device, dtype)
    pages = Pages([block], n_pages, page_size, device, dtype)
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
        require_layer(i, inputs, wanted, space.residual[:n])


def _one_span(start: int, n: int) -> PlannedSpans:
    one = np.ones(1, np.int32)
    none = np.zeros(0, np.int32)
    return PlannedSpans(one * 0, one * start, one * n, one != 1, none, none, one * 0)


def _check_head(weights: StageWeights, model: Any, rows: Tensor) -> None:
    assert weights.final is not None and weights.head is not None
    wanted = model.logits(rows)
    x, logits = (
        torch.empty_like(rows),
        torch.empty((len(rows), len(weights.head)), device=rows.device, dtype=rows.dtype),
    )
    norm(rows, weights.final, x)
    head_product(x, weights.head, logits)
    found = logits.float()
    if weights.logit_cap is not None:
        found = torch.tanh(found / weights.logit_cap) * weights.logit_cap
    require_logits(rows.dtype, wanted, found)
