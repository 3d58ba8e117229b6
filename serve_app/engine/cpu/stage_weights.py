"""The layers of one stage for the CPU engine, each checked against the module it was read from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.block import FindIntegers, Integers, Linear, NotFusable
from serve_app.engine.cpu.layers import Layer, Rotation, layer_of, new_cache, normed, run_layers, step_of
from serve_app.engine.cpu.native import Matrix, NativeLayer, NativeStage
from serve_app.engine.cpu.products import Product, packs, product_of
from serve_app.engine.request_table import PlannedSpans
from serve_app.engine.stage_weights import PROMPT, Seen, StageWeights, read_stage, require_layer, require_logits
from serve_app.engine.torch_engine import TorchEngine

_log = logging.getLogger(__name__)
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class CpuWeights:
    """A stage's weights as the CPU engine computes with them. head: None where another stage has it."""

    stage: StageWeights
    layers: tuple[Layer, ...]
    head: Product | None
    native: tuple[NativeLayer, ...] | None  # None: the compiled step does not compute this stage
    native_head: Matrix | None

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer."""
        assert self.head is not None and self.stage.final is not None
        logits = self.head(normed(rows, self.stage.final)).float()
        cap = self.stage.logit_cap
        return logits if cap is None else torch.tanh(logits.div_(cap)).mul_(cap)


@torch.inference_mode()
def read_weights(reference: TorchEngine, page_size: int, integers: FindIntegers, *, native: bool) -> CpuWeights:
    """native: by the compiled step, if it can be had. Raises NotFusable, saying what no fused engine computes.

    What is packed is held twice until the reference goes.
    """
    stage, seen = read_stage(reference, page_size, partial(_integers_alone, integers))
    head = stage.head
    if any(block.router is not None for block in stage.blocks):
        raise NotFusable("a mixture of experts")
    compiled = _compiled(stage, head, seen, page_size) if native else None
    rotations: dict[int, Rotation] = {}
    packed = compiled is None and packs(reference.dtype)
    if compiled is None:
        of = partial(product_of, packs=packed)
        layers = tuple(
            layer_of(b, rotations, tuple(of(m) for m in (b.qkv, b.out, b.gate_up, b.down))) for b in stage.blocks
        )
        head_product = None if head is None else of(head)
    else:
        layers = tuple(
            layer_of(n.block, rotations, tuple(m.product for m in (n.qkv, n.out, n.gate_up, n.down)))
            for n in compiled[0]
        )
        head_product = None if compiled[1] is None else compiled[1].product
    for i, (layer, layer_seen) in enumerate(zip(layers, seen, strict=True)):
        _check_layer(i, layer, layer_seen, page_size)
    blocks = tuple(layer.block for layer in layers)
    weights = CpuWeights(replace(stage, blocks=blocks, head=None), layers, head_product, *(compiled or (None, None)))
    if head is not None:
        rows = seen[-1].outputs[0]
        require_logits(rows.dtype, reference.model.logits(rows), weights.logits(rows))
    return weights


def _integers_alone(find: FindIntegers, name: str) -> Integers | None:
    """8-bit floats are computed with dequantised, exact even in bfloat16: no operator here reads them."""
    found = find(name)
    return None if found is None or found.stored.is_floating_point() else found


def _compiled(
    stage: StageWeights, head: Linear | None, seen: list[Seen], page_size: int
) -> tuple[tuple[NativeLayer, ...], Matrix | None] | None:
    """The weights as the compiled step reads them, if it is there and gives what the stage's modules give."""
    n_pages = -(-(PROMPT + 1) // page_size)
    page_table = np.arange(n_pages, dtype=np.int32)[None]
    layers = []
    try:
        for i, (block, layer_seen) in enumerate(zip(stage.blocks, seen, strict=True)):
            layer = NativeLayer.of(block)
            dtype, hidden = layer_seen.inputs[0].dtype, layer_seen.inputs[0].shape[1]
            cache = new_cache([block], n_pages * page_size, dtype)
            alone = NativeStage([layer], cache, page_table, page_size, hidden=hidden, threads=1)
            for start, inputs, wanted in zip((0, PROMPT), layer_seen.inputs, layer_seen.outputs, strict=True):
                x, n = inputs.clone(), len(inputs)
                alone.run(x, np.zeros(n, np.int32), np.arange(start, start + n, dtype=np.int32), _NONE)
                require_layer(i, inputs, wanted, x)
            layers.append(layer)
        return tuple(layers), None if head is None else Matrix(head)
    except NotFusable as e:
        _log.warning("decode steps are computed by torch's operators, 2 to 4 times slower: %s", e)
        return None


def _check_layer(i: int, layer: Layer, seen: Seen, page_size: int) -> None:
    n_pages = -(-(PROMPT + 1) // page_size)
    cache = new_cache([layer.block], n_pages * page_size, seen.inputs[0].dtype)
    page_table = np.arange(n_pages, dtype=np.int32)[None]
    for start, inputs, wanted in zip((0, PROMPT), seen.inputs, seen.outputs, strict=True):
        step = step_of(_one_span(start, len(inputs)), page_table, page_size)
        require_layer(i, inputs, wanted, run_layers([layer], cache, step, inputs.clone()))


def _one_span(start: int, n: int) -> PlannedSpans:
    one = np.ones(1, np.int32)
    return PlannedSpans(one * 0, one * start, one * n, one != 1, _NONE, _NONE, one * 0)
