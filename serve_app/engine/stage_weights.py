"""The weights of one stage as a fused engine reads them, from the plain engine's modules, and what checks them.

Every layer runs twice at start-up, by transformers' code and by the fused engine's, on the rows that really come to it:
a fused layer is used only if it gives what the module gives. The engine runs its own; what is wanted of it is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve_app.engine.block import (
    Block,
    FindIntegers,
    Integers,
    Linear,
    Norm,
    NotFusable,
    read_block,
    read_norm,
)
from serve_app.engine.torch_engine import TorchEngine
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan

PROMPT = 20  # rows of the check's first step; the second has one
_SEQ = 1
_HEAD = "lm_head.weight"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")


@dataclass(frozen=True, slots=True)
class StageWeights:
    """embedding, final, head: None where another stage has them. embedding: its rows are looked up, [vocab, hidden]."""

    device: torch.device
    context_length: int
    vocab_size: int
    blocks: tuple[Block, ...]
    embedding: Linear | None
    embedding_scale: float
    final: Norm | None
    head: Linear | None
    logit_cap: float | None


@dataclass(slots=True)
class Seen:
    """What a layer got and gave in each of the two steps, [rows, hidden]."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone())
        self.outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())


@torch.inference_mode()
def read_stage(reference: TorchEngine, page_size: int, integers: FindIntegers) -> tuple[StageWeights, list[Seen]]:
    """The weights, and what each layer got and gave. Raises NotFusable, saying what no fused engine computes."""
    model = reference.model
    config = model.config
    rotary = getattr(model.holder, "rotary_emb", None)
    names = {id(module): name for name, module in model.body.named_modules()}
    blocks = _sharing_tables(read_block(layer, rotary, config.max_position_embeddings) for layer in model.layers)
    blocks = _with_integers(blocks, model.layers, names, integers)
    seen, entered = _run_reference(reference, page_size)
    embedding, scale = None, 1.0
    if reference.embeds:
        table = model.body.get_input_embeddings()
        embedding = Linear(table.weight.detach(), None, integers(f"{names[id(table)]}.weight"))
        scale = _scale_of(embedding.weight[entered], torch.cat(seen[0].inputs))
    final = head = None
    cap = getattr(config, "final_logit_softcapping", None)
    if reference.has_head:
        lm_head = model.head.get_output_embeddings()
        if lm_head.bias is not None:
            raise NotFusable("an output layer with a bias")
        final, head = read_norm(model.final_norm), Linear(lm_head.weight.detach(), None, integers(_HEAD))
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
    return weights, seen


def _sharing_tables(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks, of which those that rotate alike hold one table: of 8192 positions each is 2 MB."""
    out: list[Block] = []
    for block in blocks:
        same = next((b for b in out if torch.equal(b.cos, block.cos) and torch.equal(b.sin, block.sin)), block)
        out.append(replace(block, cos=same.cos, sin=same.sin))
    return tuple(out)


def _with_integers(
    blocks: Iterable[Block], layers: Iterable[nn.Module], names: dict[int, str], integers: FindIntegers
) -> tuple[Block, ...]:
    """The blocks, whose matrices know the integers that they were computed from. names: of modules, by identity."""
    out: list[Block] = []
    for block, module in zip(blocks, layers, strict=True):
        name = names[id(module)]
        qkv = _joined(block.qkv, module, name, _QKV, integers)
        projection = _joined(block.out, module, name, ("self_attn.o_proj",), integers)
        if block.router is None:
            gate_up = _joined(block.gate_up, module, name, _GATE_UP, integers)
            down = _joined(block.down, module, name, ("mlp.down_proj",), integers)
        else:
            gate_up = replace(block.gate_up, integers=integers(f"{name}.mlp.experts.gate_up_proj"))
            down = replace(block.down, integers=integers(f"{name}.mlp.experts.down_proj"))
        out.append(replace(block, qkv=qkv, out=projection, gate_up=gate_up, down=down))
    return tuple(out)


def _joined(matrix: Linear, module: nn.Module, name: str, parts: tuple[str, ...], integers: FindIntegers) -> Linear:
    pieces = [integers(f"{name}.{part}.weight") for part in parts if _has(module, part)]
    whole = [piece for piece in pieces if piece is not None]
    if len(whole) != len(pieces) or len({piece.stored.dtype for piece in whole}) != 1:
        return matrix
    joined = torch.cat([piece.stored for piece in whole]), torch.cat([piece.scales for piece in whole])
    return replace(matrix, integers=Integers(*joined))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def require_layer(i: int, inputs: Tensor, wanted: Tensor, found: Tensor, *, coarse: bool = False) -> None:
    """Raises NotFusable unless what a fused layer found, [rows, hidden], is what the module gave within rounding.

    coarse: to a half of what the module changes, for what is rounded on purpose.
    """
    error = float((found.double() - wanted.double()).norm())
    change, size = float((wanted.double() - inputs.double()).norm()), float(wanted.double().norm())
    share, rounding = (1e-3, 1e-6) if inputs.dtype == torch.float32 else (0.03, 2.0**-8)
    if coarse:
        share = 0.5
    if not math.isfinite(error) or error > share * change + rounding * size:
        raise NotFusable(
            f"layer {i} of this stage differs by {error:.3g} where the module changes its rows by {change:.3g}"
        )


def require_logits(dtype: torch.dtype, wanted: Tensor, found: Tensor) -> None:
    """The same of the output layer; dtype: the rows'."""
    limit = 1e-4 if dtype == torch.float32 else 0.02
    if not float((found - wanted).norm()) <= limit * float(wanted.norm()):
        raise NotFusable("the output layer computes more than a norm and a product")


def _run_reference(reference: TorchEngine, page_size: int) -> tuple[list[Seen], Tensor]:
    """A prompt and one more row through transformers' code; what each layer saw, and the ids that went in."""
    n_pages, n = -(-(PROMPT + 1) // page_size), PROMPT + 1
    reference.reserve(n_pages)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, reference.vocab_size, (n,), generator=generator)
    if reference.embeds:
        rows = ids.numpy().astype("<u4").view(np.uint8)
    else:
        drawn = torch.randn((n, reference.profile.hidden_size), generator=generator).to(reference.dtype)
        rows = drawn.view(torch.uint8).numpy().reshape(-1)
    row_bytes, first = len(rows) // n, -(-PROMPT // page_size)
    seen = [Seen() for _ in reference.model.layers]
    layers = reference.model.layers
    hooks = [layer.register_forward_hook(s.hook, with_kwargs=True) for layer, s in zip(layers, seen, strict=True)]
    try:
        nothing = np.zeros(0, "<u8")
        for start, count, pages, opens, closes in (
            (0, PROMPT, range(first), [_SEQ], 0),
            (PROMPT, 1, range(first, n_pages), [], 1),
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
