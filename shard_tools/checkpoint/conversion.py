"""A checkpoint under the names and in the shapes that transformers' modules have.

Some families were published under other names than today's code gives their parameters, and with other cuts: a
Mixtral's experts as three tensors each, where the module holds all experts of a layer in two. transformers converts
while it loads; this asks the same table and runs the same operations, one parameter at a time, so that what is
served is what transformers loads. Law: a checkpoint saved converted, and one saved as published, are equal here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from shard_tools.checkpoint.families import meta_model
from shard_tools.checkpoint.source import Checkpoint, Row
from shard_tools.errors import CheckpointError


def as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as transformers' loader would see it; the same object if nothing is renamed or put together.

    Raises CheckpointError naming the tensor that is missing, double or of another dtype than its siblings, before
    any weight is read.
    """
    model = meta_model(checkpoint.config, checkpoint.label)
    renamings, converters = _transforms(model)
    if not renamings and not converters:
        return checkpoint
    state, prefix = frozenset(model.state_dict()), str(model.base_model_prefix)
    plain: dict[str, str] = {}  # name here -> name in the file
    groups: dict[str, _Group] = {}
    for name in sorted(checkpoint.table):
        renamed, pattern, converter = _loaded_name(name, renamings, converters)
        if not _is_in(renamed, state, prefix):
            renamed, converter = name, None
        if converter is None:
            _once(plain, renamed, name, checkpoint.label)
            continue
        group = groups.setdefault(renamed, _Group(_full(renamed, state, prefix), converter))
        group.parts[pattern].append(name)
    if not groups and all(here == there for here, there in plain.items()):
        return checkpoint
    return _Converted(checkpoint, model, plain, groups)


@dataclass(slots=True)
class _Group:
    """Tensors of the file that one operation turns into one parameter, or into several."""

    target: str  # the parameter's full name
    converter: Any
    parts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # pattern -> names in the file

    @property
    def names(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]


class _Converted:
    """Implements Checkpoint over another one."""

    def __init__(self, inner: Checkpoint, model: Any, plain: dict[str, str], groups: dict[str, _Group]) -> None:
        self._inner, self._model, self._plain = inner, model, plain
        self._made: dict[str, _Group] = {}  # name here -> what it is made of
        self._table = {here: inner.table[there] for here, there in plain.items()}
        for group in groups.values():
            _put_in_order(group, model, inner.label)
            dtype = _one_dtype(group, inner)
            meta = {n: torch.empty(inner.table[n].shape, dtype=dtype, device="meta") for n in group.names}
            for name, tensor in self._convert(group, meta).items():
                if name in self._table:
                    raise CheckpointError(f"{inner.label} stores {name!r} twice: whole, and as {group.names[0]!r}")
                self._made[name] = group
                self._table[name] = Row(str(dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def label(self) -> str:
        return self._inner.label

    @property
    def config(self) -> Any:
        return self._inner.config

    @property
    def license(self) -> str:
        return self._inner.license

    @property
    def table(self) -> Mapping[str, Row]:
        return self._table

    def read(self, name: str) -> torch.Tensor:
        group = self._made.get(name)
        if group is None:
            return self._inner.read(self._plain[name])
        return self._convert(group, {part: self._inner.read(part) for part in group.names})[name]

    def parts(self) -> tuple[str, ...]:
        return self._inner.parts()

    def place(self, name: str) -> tuple[str, int] | None:
        return self._inner.place(self._plain[name]) if name in self._plain else None

    def files(self) -> dict[str, bytes]:
        return self._inner.files()

    def _convert(self, group: _Group, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the group's tensors become, by full name. Empties `tensors`, so that no part is held for longer."""
        converter = deepcopy(group.converter)
        for pattern, names in group.parts.items():
            converter.collected_tensors[pattern] = [tensors.pop(name) for name in names]
        try:
            made = converter.convert(group.target, model=self._model, config=self._model.config)
        except Exception as e:  # what odd shapes make it raise is no closed set
            raise CheckpointError(
                f"{self.label}: {group.target!r} cannot be made of {group.names[0]!r} and the like: {e}"
            ) from e
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters of this model, in the order of its loader; none where it has no table."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # another transformers: families that need no conversion are published all the same
        return [], []
    found = get_model_conversion_mapping(model)
    return (
        [t for t in found if isinstance(t, WeightRenaming)],
        [t for t in found if isinstance(t, WeightConverter)],
    )


def _loaded_name(name: str, renamings: Iterable[Any], converters: Iterable[Any]) -> tuple[str, str, Any]:
    """The name after all renamings and the first converter that matches, its source pattern, and that converter."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed, pattern, converter
    return name, "", None


def _is_in(name: str, state: Collection[str], prefix: str) -> bool:
    return _full(name, state, prefix) in state


def _full(name: str, state: Collection[str], prefix: str) -> str:
    """A checkpoint saved from the bare decoder lacks the prefix."""
    return name if name in state else f"{prefix}.{name}"


def _once(plain: dict[str, str], here: str, there: str, label: str) -> None:
    if here in plain:
        raise CheckpointError(f"{label}: {there!r} and {plain[here]!r} are both {here!r}")
    plain[here] = there


def _put_in_order(group: _Group, model: Any, label: str) -> None:
    """Names of each pattern with a number in it (expert 0, 1, ...) by that number, none missing and none double."""
    numbered = [pattern for pattern in group.converter.source_patterns if "*." in pattern]
    if not numbered or len(group.converter.target_patterns) > 1:
        return
    count = model.get_parameter(group.target).shape[0]
    sample = next(pattern for pattern in numbered if group.parts.get(pattern))
    stem = group.parts[sample][0].split(".")[: -len(_tail(sample)) - 1]
    for pattern in numbered:
        tail = _tail(pattern)
        found: dict[str, str] = {}
        for name in group.parts.get(pattern, ()):
            _once(found, name.split(".")[-len(tail) - 1], name, label)
        wanted = [str(i) for i in range(count)]
        lacking = next((number for number in wanted if number not in found), None)
        if lacking is not None:
            name = ".".join((*stem, lacking, *tail))
            raise CheckpointError(f"{label} lacks tensor {name!r}, one of {count} that make up {group.target!r}")
        if len(found) > count:
            extra = min(found.keys() - set(wanted))
            raise CheckpointError(f"{label} has {found[extra]!r}, where the configuration says {count} of its kind")
        group.parts[pattern] = [found[number] for number in wanted]


def _tail(pattern: str) -> list[str]:
    """What follows the number in a name of this pattern."""
    return pattern.rpartition("*.")[2].replace("\\", "").split(".")


def _one_dtype(group: _Group, inner: Checkpoint) -> torch.dtype:
    first = inner.table[group.names[0]].dtype
    for name in group.names:
        if inner.table[name].dtype != first:
            raise CheckpointError(
                f"{inner.label}: {name!r} is of {inner.table[name].dtype} and {group.names[0]!r} of {first}, "
                f"which are parts of one parameter"
            )
    dtype = getattr(torch, first, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{inner.label}: tensor {group.names[0]!r} is of {first}, which shards do not hold")
    return dtype
