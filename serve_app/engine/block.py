"""What a fused engine must know of one decoder layer, read off transformers' module: never off the family's name.

A module that does not look like norm, attention, norm, gated MLP is refused; whether one that looks so also computes so
is for the check at start-up (stage_weights.py) to say. Merging projections leaves the module's own parameters as views
into the merged ones, so the layer stays whole and nothing is held twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activation = Literal["silu", "gelu_tanh"]

_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not change with the length


class NotFusable(Exception):
    """This layer is none that the fused path computes; the message says why."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm. offset: it multiplies by 1 + weight (Gemma)."""

    weight: Tensor
    eps: float
    offset: bool


@dataclass(frozen=True, slots=True)
class Integers:
    """A quantised weight as its shard holds it (shard_tools/quantised.py): integers, or 8-bit floats."""

    stored: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that they stand for, or of one expert's: [out, in]."""
        n_out, n_stored = self.stored.shape[-2:]
        return n_out, 2 * n_stored if self.stored.dtype == torch.uint8 else n_stored


FindIntegers = Callable[[str], Integers | None]  # of a parameter by name


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in], of experts [experts, out, in]; bias [out] or None.

    integers: what the weight was computed from, if it was; weight is empty where an engine computes with these alone.
    """

    weight: Tensor
    bias: Tensor | None
    integers: Integers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.integers.shape if self.integers is not None else (self.weight.shape[-2], self.weight.shape[-1])

    @property
    def n_out(self) -> int:
        """Rows of the matrix."""
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class Router:
    """Which `top` experts a row goes to: those of the largest softmax of the product with `linear` [experts, in].

    normalised: their weights then add up to one. rounded: weights are rounded to the dtype of the rows.
    """

    linear: Linear
    top: int
    normalised: bool
    rounded: bool

    @property
    def n_experts(self) -> int:
        """How many there are to choose from."""
        return self.linear.n_out


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer. cos, sin: [positions, rotary / 2] float32. router: gate_up and down are of experts."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None
    cos: Tensor
    sin: Tensor
    norm_in: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    after_attention: Norm | None  # on what attention gives, before it is added (Gemma)
    norm_mid: Norm
    gate_up: Linear
    down: Linear
    after_mlp: Norm | None
    activation: Activation
    router: Router | None = None


def read_block(layer: nn.Module, rotary: Any, context_length: int) -> Block:
    """The facts and merged weights of one layer. Raises NotFusable."""
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    qkv = _merged(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    out = _linear(attention, "o_proj")
    router = None
    if hasattr(mlp, "experts"):
        router, gate_up, down, mlp = _experts(mlp)
    else:
        gate_up, down = _merged(mlp, ("gate_proj", "up_proj"), "gate_up_proj"), _linear(mlp, "down_proj")
    dim = int(attention.head_dim)
    heads = out.weight.shape[1] // dim
    kv_heads = (qkv.weight.shape[0] // dim - heads) // 2
    if dim & (dim - 1) or dim < 16:
        raise NotFusable(f"heads of {dim} dimensions, which is no power of two of 16 or more")
    if (heads + 2 * kv_heads) * dim != qkv.weight.shape[0] or heads % kv_heads:
        raise NotFusable(f"{qkv.weight.shape[0]} outputs of q, k and v do not make up heads of {dim}")
    has_post_norms = hasattr(layer, "post_feedforward_layernorm")
    if has_post_norms != hasattr(layer, "pre_feedforward_layernorm"):
        raise NotFusable("norms in an unknown arrangement")
    q_norm, k_norm = _optional_norm(attention, "q_norm"), _optional_norm(attention, "k_norm")
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm.weight.shape != (dim,)):
        raise NotFusable("query and key norms that are not per head")
    cos, sin = _rotation(rotary, layer, qkv.weight.device, context_length)
    window = getattr(attention, "sliding_window", None)
    return Block(
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        scale=float(attention.scaling),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=int(window) if window is not None else None,
        sinks=getattr(attention, "sinks", None),
        cos=cos,
        sin=sin,
        norm_in=_norm(layer, "input_layernorm"),
        qkv=qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        out=out,
        after_attention=_norm(layer, "post_attention_layernorm") if has_post_norms else None,
        norm_mid=_norm(layer, "pre_feedforward_layernorm" if has_post_norms else "post_attention_layernorm"),
        gate_up=gate_up,
        down=down,
        after_mlp=_norm(layer, "post_feedforward_layernorm") if has_post_norms else None,
        activation=_activation(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)),
        router=router,
    )


def _child(module: nn.Module, name: str) -> Any:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise NotFusable(f"{type(module).__name__} has no {name}")
    return child


def _linear(module: nn.Module, name: str) -> Linear:
    child = _child(module, name)
    if type(child) is not nn.Linear:
        raise NotFusable(f"{name} is no plain linear layer but {type(child).__name__}")
    return Linear(child.weight.detach(), child.bias.detach() if child.bias is not None else None)


def _merged(module: nn.Module, parts: tuple[str, ...], whole: str) -> Linear:
    """One matrix of several projections of the same input; their parameters become views into it."""
    if hasattr(module, whole):
        return _linear(module, whole)
    linears = [_linear(module, name) for name in parts]
    if len({linear.bias is None for linear in linears}) != 1:
        raise NotFusable(f"some of {', '.join(parts)} have a bias and some have none")
    weight = _join(module, parts, "weight")
    return Linear(weight, None if linears[0].bias is None else _join(module, parts, "bias"))


def _join(module: nn.Module, parts: tuple[str, ...], leaf: str) -> Tensor:
    owners = [module.get_submodule(name) for name in parts]
    merged = torch.cat([owner._parameters[leaf].detach() for owner in owners])  # type: ignore[union-attr]
    at = 0
    for owner in owners:
        old = owner._parameters[leaf]
        assert old is not None
        old.data = merged[at : at + len(old)]
        at += len(old)
    return merged


def _experts(mlp: nn.Module) -> tuple[Router, Linear, Linear, nn.Module]:
    """Router, gate_up and down of a mixture of stacked experts, and the module of these."""
    gate, experts = _child(mlp, "gate"), _child(mlp, "experts")
    parameters = dict(experts.named_parameters())
    known = {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}
    other = sorted({name for name, _ in mlp.named_parameters()} ^ known)
    if other:
        raise NotFusable(f"{type(mlp).__name__} has or lacks {other[0]}")
    gate_up, down = (parameters[name].detach() for name in ("gate_up_proj", "down_proj"))
    n, inner = gate_up.shape[0], down.shape[-1]
    if gate_up.ndim != 3 or gate_up.shape[1] != 2 * inner or down.shape != (n, gate_up.shape[2], inner):
        raise NotFusable(f"experts of shapes {list(gate_up.shape)} and {list(down.shape)}")
    return _router(gate), Linear(gate_up, None), Linear(down, None), experts


@torch.inference_mode()
def _router(gate: Any) -> Router:
    """Which router a module is, seen from what it does to random rows. Raises NotFusable."""
    weight, top = gate.weight.detach(), getattr(gate, "top_k", None)
    if not isinstance(top, int) or not 0 < top <= len(weight):
        raise NotFusable(f"{type(gate).__name__} does not say how many experts it chooses")
    x = torch.randn((4, weight.shape[1]), device=weight.device, dtype=weight.dtype)
    found = gate(x)
    if not isinstance(found, tuple) or len(found) != 3 or found[1].shape != (4, top):
        raise NotFusable(f"{type(gate).__name__} gives no weights of the experts it chooses")
    wanted, rounded = found[1].float(), found[1].dtype == weight.dtype
    shares = torch.topk(nn.functional.linear(x, weight).float().softmax(-1), top).values
    for normalised, given in ((True, shares / shares.sum(-1, keepdim=True)), (False, shares)):
        if (given - wanted).norm() <= 0.01 * wanted.norm():
            return Router(Linear(weight, None), top, normalised, rounded)
    raise NotFusable(f"{type(gate).__name__} does not weigh experts by a softmax")


def _optional_norm(module: nn.Module, name: str) -> Norm | None:
    return _norm(module, name) if isinstance(getattr(module, name, None), nn.Module) else None


def _norm(module: nn.Module, name: str) -> Norm:
    return read_norm(_child(module, name))


@torch.inference_mode()
def read_norm(norm: nn.Module) -> Norm:
    """Which RMS norm a module is, seen from what it does to a random row. Raises NotFusable."""
    weight: Any = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or getattr(norm, "bias", None) is not None:
        raise NotFusable(f"{type(norm).__name__} is no RMS norm with a weight")
    x = torch.randn((4, len(weight)), device=weight.device, dtype=weight.dtype)
    wanted, scaled = norm(x).float(), x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    for offset in (False, True):
        found = scaled * (weight.float() + float(offset))
        if (found - wanted).norm() <= 0.01 * wanted.norm():
            return Norm(weight.detach(), eps, offset)
    raise NotFusable(f"{type(norm).__name__} does not compute an RMS norm")


@torch.inference_mode()
def _activation(module: Any) -> Activation:
    if module is None:
        raise NotFusable("the MLP names no activation")
    x = torch.linspace(-6, 6, 64)
    known: dict[Activation, Tensor] = {
        "silu": nn.functional.silu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
    }
    wanted = module(x)
    for name, found in known.items():
        if torch.allclose(found, wanted, atol=1e-5):
            return name
    raise NotFusable(f"activation {type(module).__name__}")


@torch.inference_mode()
def _rotation(rotary: Any, layer: Any, device: torch.device, context_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, half of each row (the other half is the same), in float32."""
    if rotary is None:
        raise NotFusable("no rotary embedding")
    arguments: dict[str, Any] = {}
    kind: Any = getattr(rotary, "rope_type", None)
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        arguments["layer_type"] = getattr(layer.self_attn, "layer_type", None)
        kind = kind.get(arguments["layer_type"]) if isinstance(kind, dict) else kind
    if kind not in _FIXED_ROPES:
        raise NotFusable(f"rotary embedding of type {kind!r}")
    positions = torch.arange(context_length, device=device)[None]
    cos, sin = rotary(torch.zeros((), device=device), positions, **arguments)
    half = cos.shape[-1] // 2
    if not torch.equal(cos[..., :half], cos[..., half:]):
        raise NotFusable("a rotary embedding that is not in half-split form")
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
