"""The layers of one stage for the CPU engine, each checked against the module it was read from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from serve_app.engine.block import Block, Linear, NotFusable
from serve_app.engine.cpu.layers import Layer, Rotation, layer_of, new_cache, normed, run_layers, step_of
from serve_app.engine.cpu.native import NativeStage
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
    native: bool  # whether the compiled step computes this stage; `stage` holds the matrices then

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer."""
        assert self.head is not None and self.stage.final is not None
        logits = self.head(normed(rows, self.stage.final)).float()
        cap = self.stage.logit_cap
        return logits if cap is None else torch.tanh(logits.div_(cap)).mul_(cap)


@torch.inference_mode()
def read_weights(reference: TorchEngine, page_size: int, *, native: bool) -> CpuWeights:
    """native: by the compiled step, if it can be had. Raises NotFusable, saying what no fused engine computes.


    The reference is as before then. Else it may have lost its layers: the same values are not held twice.
    """
    stage, seen = read_stage(reference, page_size)
    native = native and _native_computes(stage, seen, page_size)
    packed = not native and packs(reference.dtype)
    rotations: dict[int, Rotation] = {}
    for i, (block, layer_seen) in enumerate(zip(stage.blocks, seen, strict=True)):
        _check_layer(i, layer_of(block, rotations, packs=packed), layer_seen, page_size)
    head = None if stage.head is None else product_of(Linear(stage.head, None), packs=packed)
    if head is not None:
        rows = seen[-1].outputs[0]
        found = CpuWeights(stage, (), head, native).logits(rows)
        require_logits(rows.dtype, reference.model.logits(rows), found)
    layers = []
    for block, module in zip(stage.blocks, reference.model.layers, strict=True):
        layers.append(layer_of(block, rotations, packs=packed))
        if packed:
            _forget(block, module)
    return CpuWeights(stage if native else replace(stage, head=None), tuple(layers), head, native)


def _native_computes(stage: StageWeights, seen: list[Seen], page_size: int) -> bool:
    """Whether the compiled step is there, takes this stage and gives what its modules give."""
    n_pages = -(-(PROMPT + 1) // page_size)
    page_table = np.arange(n_pages, dtype=np.int32)[None]
    try:
        for i, (block, layer_seen) in enumerate(zip(stage.blocks, seen, strict=True)):
            dtype, hidden = layer_seen.inputs[0].dtype, layer_seen.inputs[0].shape[1]
            cache = new_cache([block], n_pages * page_size, dtype)
            alone = NativeStage([block], cache, page_table, page_size, hidden=hidden, threads=1)
            for start, inputs, wanted in zip((0, PROMPT), layer_seen.inputs, layer_seen.outputs, strict=True):
                x, n = inputs.clone(), len(inputs)
                alone.run(x, np.zeros(n, np.int32), np.arange(start, start + n, dtype=np.int32), _NONE)
                require_layer(i, inputs, wanted, x)
    except NotFusable as e:
        _log.warning("decode steps are computed by torch's operators, 2 to 4 times slower: %s", e)
        return False
    return True


def _forget(block: Block, module: nn.Module) -> None:
    """The memory of matrices that have been packed goes, layer by layer, so that never all are held twice."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.new_empty(0)
    for matrix in (block.qkv, block.out, block.gate_up, block.down):
        matrix.weight.set_(matrix.weight.new_empty(0))  # type: ignore[call-overload]


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
