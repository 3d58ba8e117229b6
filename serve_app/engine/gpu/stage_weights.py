"""The weights of one stage as the GPU engine reads them, taken from the plain engine's modules and checked by them.

The check runs every layer twice at start-up, by transformers' code and by ours, on the rows that really come to it:
a fused layer is used only if it gives what the module gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.gpu.attend import DecodeAttention, PrefillAttention, tiles_of
from serve_app.engine.gpu.block import Block, Norm, NotFusable, read_block, read_norm
from serve_app.engine.gpu.forward import Pages, Space, head_product, norm, run_layers
from serve_app.engine.gpu.request_table import PlannedSpans
from serve_app.engine.torch_engine import TorchEngine
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan

_PROMPT = 20  # rows of the check's first step; the second has one
_SEQ = 1


@dataclass(frozen=True, slots=True)
class StageWeights:
    """embedding, final, head: None where another stage has them."""

    device: torch.device
    context_length: int
    vocab_size: int
    blocks: tuple[Block, ...]
    embedding: Tensor | None
    embedding_scale: float
    final: Norm | None
    head: Tensor | None
    logit_cap: float | None


@dataclass(slots=True)
class _Seen:
    """What a layer got and gave in each of the two steps, [rows, hidden]."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone())
        self.outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())


@torch.inference_mode()
def read_weights(reference: TorchEngine, page_size: int) -> StageWeights:
    """Raises NotFusable, saying what in this model the fused path does not compute."""
    model = reference.model
    config = model.config
    rotary = getattr(model.holder, "rotary_emb", None)
    blocks = tuple(read_block(layer, rotary, config.max_position_embeddings) for layer in model.layers)
    seen, entered = _run_reference(reference, page_size)
    embedding, scale = None, 1.0
    if reference.embeds:
        embedding = model.body.get_input_embeddings().weight.detach()
        scale = _scale_of(embedding[entered], torch.cat(seen[0].inputs))
    final = head = None
    cap = getattr(config, "final_logit_softcapping", None)
    if reference.has_head:
        lm_head = model.head.get_output_embeddings()
        if lm_head.bias is not None:
            raise NotFusable("an output layer with a bias")
        final, head = read_norm(model.final_norm), lm_head.weight.detach()
    weights = StageWeights(
        device=reference.device,
        context_length=config.max_position_embeddings,
        vocab_size=reference.vocab_size,
        blocks=blocks,
        embedding=embedding,
        embedding_scale=scale,
        final=final,
        head=head,
        logit_cap=cap,
    )
    for i, (block, layer_seen) in enumerate(zip(blocks, seen, strict=True)):
        _check_layer(i, block, layer_seen, page_size)
    if final is not None and head is not None:
        _check_head(weights, model, seen[-1].outputs[0])
    return weights


def _run_reference(reference: TorchEngine, page_size: int) -> tuple[list[_Seen], Tensor]:
    """A prompt and one more row through transformers' code; what each layer saw, and the ids that went in."""
    n_pages, n = -(-(_PROMPT + 1) // page_size), _PROMPT + 1
    reference.reserve(n_pages)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, reference.vocab_size, (n,), generator=generator)
    if reference.embeds:
        rows = ids.numpy().astype("<u4").view(np.uint8)
    else:
        drawn = torch.randn((n, reference.profile.hidden_size), generator=generator).to(reference.dtype)
        rows = drawn.view(torch.uint8).numpy().reshape(-1)
    row_bytes, first = len(rows) // n, -(-_PROMPT // page_size)
    seen = [_Seen() for _ in reference.model.layers]
    layers = reference.model.layers
    hooks = [layer.register_forward_hook(s.hook, with_kwargs=True) for layer, s in zip(layers, seen, strict=True)]
    try:
        nothing = np.zeros(0, "<u8")
        for start, count, pages, opens, closes in (
            (0, _PROMPT, range(first), [_SEQ], 0),
            (_PROMPT, 1, range(first, n_pages), [], 1),
        ):
            opening = np.zeros(len(opens), OPEN)
            opening["seq"] = opens
            plan = StepPlan(
                0,
                0,
                opening,
                np.array([(_SEQ, start, count, len(pages), 0)], SPAN),
                np.array(pages, "<u4"),
                np.array([(_SEQ, n, 0)] * closes, CLOSE),
                nothing,
            )
            reference.run(plan, rows[start * row_bytes : (start + count) * row_bytes].data)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, ids.to(reference.device)


def _scale_of(rows: Tensor, entered: Tensor) -> float:
    """What the model multiplies its embeddings with before the first layer (Gemma does)."""
    a, b = rows.double(), entered.double()
    scale = float((a * b).sum() / (a * a).sum())
    if abs(scale - 1.0) < 1e-3:
        scale = 1.0
    if float((a * scale - b).norm()) > 0.005 * float(b.norm()):
        raise NotFusable("the model does more to its embeddings than scaling them")
    return scale


def _check_layer(i: int, block: Block, seen: _Seen, page_size: int) -> None:
    device, dtype = seen.inputs[0].device, seen.inputs[0].dtype
    n_pages = -(-(_PROMPT + 1) // page_size)
    space = Space(_PROMPT, [block], seen.inputs[0].shape[1], device, dtype)
    pages = Pages([block], n_pages, page_size, device, dtype)
    page_table = torch.arange(n_pages, dtype=torch.int32, device=device)[None]
    decode = DecodeAttention([block], 1, device)
    for start, inputs, wanted in zip((0, _PROMPT), seen.inputs, seen.outputs, strict=True):
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
        error = float((space.residual[:n].double() - wanted.double()).norm())
        change, size = float((wanted.double() - inputs.double()).norm()), float(wanted.double().norm())
        share, rounding = (1e-3, 1e-6) if dtype == torch.float32 else (0.03, 2.0**-8)
        if not math.isfinite(error) or error > share * change + rounding * size:
            raise NotFusable(
                f"layer {i} of this stage differs by {error:.3g} where the module changes its rows by {change:.3g}"
            )


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
    limit = 1e-4 if rows.dtype == torch.float32 else 0.02
    if not float((found - wanted).norm()) <= limit * float(wanted.norm()):
        raise NotFusable("the output layer computes more than a norm and a product")
