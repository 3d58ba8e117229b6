"""Which parameters a model has, their shapes, and the unit each belongs to, from its configuration alone.

The module is built by transformers on the meta device (no memory), so what is expected of a checkpoint is what
the code that will run it expects. Knows the layout Hugging Face models share: a decoder with a list of layers;
what comes before the list feeds it (embedding), what comes after it, or beside the decoder, ends it (head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from shard_tools.checkpoint.source import Row
from shard_tools.errors import CheckpointError
from shard_tools.manifest_parts import MAX_LAYERS

_LAYER_LISTS = ("layers", "h", "decoder.layers", "blocks")
_ENDINGS = frozenset(("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "project_out"))
_CONTEXT = ("max_position_embeddings", "n_positions", "seq_length")
_IGNORED = r"rotary_emb\.inv_freq"  # in old checkpoints; follows from the configuration


@dataclass(frozen=True, slots=True)
class Parameter:
    """One name in the module's state. unit: 0 embedding, 1 .. n layers, n + 1 head. same_as: tied to that name."""

    name: str
    shape: tuple[int, ...]
    unit: int
    same_as: str | None


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a configuration demands of a checkpoint."""

    model_type: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    prefix: str  # of the decoder's names; checkpoints saved from the bare decoder lack it
    parameters: tuple[Parameter, ...]  # in unit order, then by name
    ignored: tuple[str, ...]  # patterns of names that transformers does not load either

    def sources(self, table: Mapping[str, Row], label: str) -> dict[str, str]:
        """For each parameter that is not tied, the checkpoint's name of it.

        Raises CheckpointError naming the first tensor that is missing, left over, double or of another shape.
        """
        left = set(table)
        found: dict[str, str] = {}
        for parameter in self.parameters:
            for name in self._spellings(parameter.name):
                if name in left:
                    self._check_shape(parameter, table[name], label)
                    found[parameter.name] = name
                    left.discard(name)
                    break
        for parameter in self.parameters:
            if parameter.same_as is None and parameter.name not in found:
                twin = next((p.name for p in self.parameters if p.same_as == parameter.name and p.name in found), None)
                if twin is None:
                    raise CheckpointError(self._missing(parameter, left, label))
                found[parameter.name] = found[twin]
        left = {name for name in left if not any(re.search(pattern, name) for pattern in self.ignored)}
        if left:
            raise CheckpointError(
                f"{label} has {len(left)} tensors that a {self.model_type} of this configuration has not, "
                f"such as {min(left)!r}. Is config.json of another model?"
            )
        return found

    def _spellings(self, name: str) -> tuple[str, ...]:
        bare = name.removeprefix(self.prefix + ".")
        return (name,) if bare == name else (name, bare)

    def _check_shape(self, parameter: Parameter, row: Row, label: str) -> None:
        if row.shape != parameter.shape:
            raise CheckpointError(
                f"{label}: tensor {parameter.name!r} has the shape {list(row.shape)} where the configuration "
                f"says {list(parameter.shape)}"
            )

    def _missing(self, parameter: Parameter, left: set[str], label: str) -> str:
        hint = ""
        if any(".experts." in name for name in left):
            hint = " It has experts stored apart, which this version of transformers does not stack for this family."
        return f"{label} lacks tensor {parameter.name!r} {list(parameter.shape)}, or it has another name.{hint}"


def architecture(config: Any, label: str) -> Architecture:
    """What `config` demands. Raises CheckpointError if transformers has no such causal model, or not of this layout."""
    model = meta_model(config, label)
    n_layers = int(config.num_hidden_layers)
    path = _layers_path(model, n_layers, label)
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    units = {name: _unit(model, name, path, n_layers) for name in state}
    first: dict[int, str] = {}
    parameters = []
    for name in sorted(state, key=lambda name: (units[name], name)):
        tensor = state[name]
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{label}: {name!r} of a {config.model_type} is of {tensor.dtype}, which shards do not hold"
            )
        owner = first.setdefault(id(tensor), name)
        parameters.append(Parameter(name, tuple(tensor.shape), units[name], None if owner == name else owner))
    return Architecture(
        str(config.model_type),
        n_layers,
        _positive(config, label, "the width of its activations", "hidden_size"),
        _positive(config, label, "the size of its vocabulary", "vocab_size"),
        _positive(config, label, "how many tokens its context holds", *_CONTEXT),
        str(model.base_model_prefix),
        tuple(parameters),
        (_IGNORED, *sorted(model._keys_to_ignore_on_load_unexpected or ())),
    )


def meta_model(config: Any, label: str = "the configuration") -> Any:
    """The module of this configuration with no memory behind its parameters. Raises CheckpointError."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:  # before anybody builds two billion of them
        raise CheckpointError(f"{label} asks for {layers} decoder layers; 1 to {MAX_LAYERS} can be had")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:  # what bad files make it raise is no closed set
        kind = getattr(config, "model_type", "?")
        raise CheckpointError(
            f"{label}: transformers cannot build a causal language model of type {kind!r}: {e}"
        ) from e
    finally:
        logging.set_verbosity(verbosity)


def _layers_path(model: Any, n_layers: int, label: str) -> str:
    for path in _LAYER_LISTS:
        full = f"{model.base_model_prefix}.{path}"
        try:
            layers = model.get_submodule(full)
        except AttributeError:
            continue
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == n_layers > 0:
            return full
    raise CheckpointError(
        f"{label}: a {model.config.model_type} has no list of {n_layers} decoder layers where one was looked for "
        f"({', '.join(_LAYER_LISTS)}); this family is not supported"
    )


def _unit(model: Any, name: str, layers: str, n_layers: int) -> int:
    head = n_layers + 1
    if name.startswith(layers + "."):
        return 1 + int(name[len(layers) + 1 :].split(".")[0])
    decoder, _, list_name = layers.rpartition(".")
    if not name.startswith(decoder + "."):
        return head  # lm_head and whatever else stands beside the decoder
    child = name[len(decoder) + 1 :].split(".")[0]
    order = [child_name for child_name, _ in model.get_submodule(decoder).named_children()]
    if child in _ENDINGS or (child in order and order.index(child) > order.index(list_name)):
        return head
    return 0


def _positive(config: Any, label: str, what: str, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise CheckpointError(f"{label}: the configuration does not say {what} ({' or '.join(names)})")
