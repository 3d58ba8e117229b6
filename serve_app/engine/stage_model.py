"""One contiguous range of a transformers model, holding only its own parameters.

The model is built on the meta device, so nothing is allocated; foreign layers become pass-throughs; own tensors
are put in place by name. Weights are given by a callable, so that this file knows nothing of shards.
Technique: transformers' own pipeline plan keeps such pass-throughs; a probe of ours equalled the full model
on 39 of 42 families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from serve_app.engine import attention
from serve_app.engine.kv_pages import KvPages
from serve_app.errors import ConfigError

_LAYER_LISTS = ("layers", "h", "blocks")
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm")

ReadTensor = Callable[[str, torch.device], Tensor]


class _Pass(nn.Module):
    """Stands where another stage's layer would: hands on what it gets."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class _Inject(nn.Module):
    """Stands where layer 0 would: puts the rows that came from outside into the model's path."""

    rows: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.rows is not None
        return self.rows


class _Nothing(nn.Module):
    """Stands where another stage's part of the embedding would: changes nothing, since rows enter behind it."""

    def forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return given if given.is_floating_point() else torch.zeros((*given.shape, 1), device=given.device)


class StageModel:
    """Layers [start, stop) of a model, with the embedding if start is 0 and the head if asked for."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        start: int,
        stop: int,
        head: bool,
        names: Iterable[str],
        read: ReadTensor,
        kv: KvPages,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """names: every parameter of this range; read(name, device) gives it, in the shard's dtype.

        Raises ConfigError for an architecture that cannot be cut into stages.
        """
        attention.register()
        self._device, self._dtype = device, dtype
        self._start, self._stop = start, stop
        self._parameters: dict[str, nn.Parameter] = {}
        names = list(names)
        self._body = _skeleton(config, dtype)
        self._first = _keep_layers(self._body, start, stop)
        _drop_final_norm(self._body)
        for module in self._body.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, attention.KV_ATTRIBUTE, kv)
        self._fill(self._body.base_model, self._body, names, read)
        self._head: Any = None
        if head:
            self._head = _skeleton(config, dtype)
            self._entry = _keep_layers(self._head, 0, 0)
            assert self._entry is not None
            self._fill(self._head, self._head, names, read)
            _stand_in_for_embedding(self._head)
        if self._first is not None:
            _stand_in_for_embedding(self._body)
        unplaced = sorted(set(names) - self._parameters.keys())
        if unplaced:
            raise ConfigError(f"the model's code has no place for {unplaced[0]} ({len(unplaced)} such tensors)")

    @property
    def body(self) -> Any:
        """transformers' model of this range: foreign layers pass through, the final norm is taken out."""
        return self._body

    @property
    def head(self) -> Any:
        """transformers' model from the final norm on, if the head is here."""
        return self._head

    @property
    def config(self) -> Any:
        """transformers' parsed configuration."""
        return self._body.config

    @property
    def holder(self) -> Any:
        """The module that holds the decoder layers and what belongs to all of them."""
        return _layer_list(self._body)[0]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of this range, in order."""
        holder, name = _layer_list(self._body)
        return list(getattr(holder, name))[self._start : self._stop]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the output layer."""
        holder, _ = _layer_list(self._head)
        found: nn.Module = next(getattr(holder, name) for name in _FINAL_NORMS if hasattr(holder, name))
        return found

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters held here; a tied head shares the embedding's."""
        distinct = {p.data_ptr(): p for p in self._parameters.values()}
        return sum(p.numel() * p.element_size() for p in distinct.values())

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        """rows: ids [n] if the embedding is here, else activations [n, hidden]. Returns activations [n, hidden]."""
        fields: dict[str, Any] = {"position_ids": positions[None], "use_cache": False}
        if self._first is None:
            fields["input_ids"] = rows[None]
        else:
            # Whatever the model does to its embeddings (Gemma scales them) must not touch these rows:
            # they enter behind it, at the place of layer 0.
            self._first.rows = fields["inputs_embeds"] = rows[None]
        hidden: Tensor = self._body.base_model(**fields)[0]
        if hidden.shape[:-1] != (1, len(rows)):
            raise ConfigError(f"{type(self._body).__name__} passes between its layers more than one row per position")
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [n, vocab] of activations that left the last layer [n, hidden]."""
        assert self._head is not None and self._entry is not None
        self._entry.rows = hidden[None]
        positions = torch.zeros((1, len(hidden)), dtype=torch.int64, device=self._device)
        out = self._head(inputs_embeds=hidden[None], position_ids=positions, use_cache=False)
        logits: Tensor = out.logits[0].float()
        return logits

    def _fill(self, part: nn.Module, model: Any, names: list[str], read: ReadTensor) -> None:
        """Put every parameter of `names` that `part` has in its place; the rest of the skeleton stays meta."""
        # First the buffers: the initialiser that fills them would draw a module's parameters anew as well, which
        # costs nothing only while those are meta.
        _materialise_buffers(model, self._device)
        inside = {id(p) for p in part.parameters()}
        wanted = set(names)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name not in wanted or id(parameter) not in inside:
                continue
            own = self._parameters.get(name)
            if own is None:
                tensor = read(name, self._device)
                if tensor.shape != parameter.shape:
                    raise ConfigError(
                        f"{name} has shape {list(tensor.shape)}, the model expects {list(parameter.shape)}"
                    )
                own = nn.Parameter(tensor.to(self._dtype), requires_grad=False)
                self._parameters[name] = own
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = own


def _skeleton(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The whole model without storage, with our attention."""
    model_type = config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"this transformers knows no model_type {model_type!r}: update transformers, or shard another model"
        )
    parsed = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in config.items() if k != "dtype"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed, attn_implementation=attention.NAME, dtype=dtype)
    return model.eval()


def _layer_list(model: Any) -> tuple[Any, str]:
    base = model.base_model
    for holder in (base, getattr(base, "decoder", None)):
        for name in _LAYER_LISTS:
            if isinstance(getattr(holder, name, None), nn.ModuleList):
                return holder, name
    raise ConfigError(f"{type(model).__name__} has no list of decoder layers that can be cut into stages")


def _keep_layers(model: Any, start: int, stop: int) -> _Inject | None:
    """Replace all layers but [start, stop). Returns the entry for rows, or None if layer 0 is kept."""
    holder, name = _layer_list(model)
    layers = getattr(holder, name)
    entry = None
    for i, layer in enumerate(layers):
        if start <= i < stop:
            continue
        stand_in: nn.Module = _Pass()
        if i == 0:
            stand_in = entry = _Inject()
        for attribute in ("attention_type", "layer_type", "is_attention_layer"):  # the model's loop reads these
            if hasattr(layer, attribute):
                setattr(stand_in, attribute, getattr(layer, attribute))
        layers[i] = stand_in
    return entry


def _stand_in_for_embedding(model: Any) -> None:
    """What else turns ids or positions into rows (learned positions, their norm) is another stage's, and runs here too.

    The table of ids itself is never asked: rows are given in its place.
    """
    holder, layers = _layer_list(model)
    ids = model.get_input_embeddings()
    for name, child in list(holder.named_children()):
        if name != layers and child is not ids and any(p.is_meta for p in child.parameters()):
            setattr(holder, name, _Nothing())


def _drop_final_norm(model: Any) -> None:
    """The rows that leave the last layer are what is hashed: the final norm belongs to the head."""
    holder, _ = _layer_list(model)
    for name in _FINAL_NORMS:
        if isinstance(getattr(holder, name, None), nn.Module):
            setattr(holder, name, nn.Identity())


def _materialise_buffers(model: Any, device: torch.device) -> None:
    """Give storage and values to what is computed from the config, such as rotary frequencies."""
    for module in model.modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in lost:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if lost:
            # transformers computes every such buffer anew in its initialiser, for this very purpose.
            with torch.no_grad():
                model._init_weights(module)
