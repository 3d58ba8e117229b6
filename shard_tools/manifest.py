"""What a model is: which bytes hold which tensor, and which tensors make which unit.

A *shard* is one safetensors file. A *unit* is what a stage can own: the embedding, one decoder layer, or
the head (final norm and output projection). A unit is a list of tensors, each in some shard: a tied head
names a tensor of the embedding's shard, so the bytes are stored once. Units tile the model exactly:
embedding, layers 0 .. n-1, head, in that order.

The byte form is one block that links, for each shard, its file and its index block (manifest_parts.py); so
models of any size fit, and one recursive pin of the manifest keeps the whole model.
Law: `Manifest.decode(m.encode(), get) == m` where get answers `m.index_blocks()`; the bytes are the same on
any machine. Described in FORMATS.md. Knows nothing of stores, signatures, torch or the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType, get_args

from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import ManifestError
from shard_tools.manifest_parts import (
    MAX_BLOCK_BYTES,
    MAX_LAYERS,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    Dtype,
    File,
    FloatDtype,
    Leaf,
    Shard,
    Tensor,
    TensorRef,
    Unit,
    UnitKind,
    check_name,
    check_range,
)
from shard_tools.quantised import Scheme, scale_of, scale_shape
from shard_tools.shard_file import FLOATS

__all__ = [
    "Dtype",
    "File",
    "FloatDtype",
    "Leaf",
    "Manifest",
    "ModelName",
    "Shard",
    "Tensor",
    "TensorRef",
    "Unit",
    "UnitKind",
]

ModelName = NewType("ModelName", str)

MAX_MANIFEST_BYTES = MAX_BLOCK_BYTES
MAX_SHARDS = MAX_LAYERS + 2
MAX_FILES = 64
MAX_WIDTH = 1 << 24  # of hidden size and vocabulary
MAX_CONTEXT = 1 << 30  # tokens

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One whole model. Constructing one with a gap, an overlap or an unknown dtype raises ManifestError."""

    name: ModelName
    model_type: str  # transformers' config.model_type
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int  # tokens
    dtype: FloatDtype  # of the activations between stages; shards may hold some tensors in others
    license: str  # SPDX id, or empty if the source does not say
    files: tuple[File, ...] = field(repr=False)  # sorted by path
    shards: tuple[Shard, ...] = field(repr=False)
    units: tuple[Unit, ...] = field(repr=False)
    quantised: Scheme | None = None  # how weights were made integers (quantised.py); None: they are floats
    _block: list[bytes] = field(default_factory=list, init=False, repr=False, compare=False)  # encode(), once made

    def __post_init__(self) -> None:
        check_model_name(self.name)
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.model_type) or not re.fullmatch(r"[ -~]{0,64}", self.license):
            raise ManifestError(f"model type {self.model_type[:80]!r} or license {self.license[:80]!r} is not a name")
        check_range("n_layers", self.n_layers, 1, MAX_LAYERS)
        check_range("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_range("vocab_size", self.vocab_size, 1, MAX_WIDTH)
        check_range("context_length", self.context_length, 1, MAX_CONTEXT)
        check_range("the number of shards", len(self.shards), 1, MAX_SHARDS)
        check_range("the number of files", len(self.files), 0, MAX_FILES)
        if self.dtype not in FLOATS:
            raise ManifestError(f"dtype {self.dtype!r} is unknown")
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ManifestError("the files are not sorted by path, or two have one path")
        if self.quantised not in (None, *get_args(Scheme)):
            raise ManifestError(f"the scheme of quantisation {self.quantised!r} is unknown")
        self._check_units()
        self._check_integers()

    def encode(self) -> bytes:
        """The block of this manifest. Raises ManifestError past MAX_MANIFEST_BYTES."""
        if not self._block:
            block = canonical.encode(self._to_value())
            check_range("the manifest's size in bytes", len(block), 1, MAX_MANIFEST_BYTES)
            self._block.append(block)
        return self._block[0]

    def index_blocks(self) -> tuple[bytes, ...]:
        """The index block of each shard: what the manifest's block links besides files, and must lie beside it."""
        return tuple(shard.index() for shard in self.shards)

    @classmethod
    def decode(cls, block: bytes, get: Callable[[Cid], bytes]) -> Manifest:
        """Read a manifest block; get answers the verified index blocks it links (BlockStore.get does).

        Raises FormatError, ManifestError, and whatever get raises.
        """
        with Fields(canonical.decode(block, max_bytes=MAX_MANIFEST_BYTES), "manifest") as f:
            f.integer("v", 1, 1)
            shards = tuple(_shard(item, get) for item in f.items("shards", MAX_SHARDS))
            rows = f.items("units", MAX_LAYERS + 2)
            manifest = cls(
                ModelName(f.text("name", 200)),
                f.text("type", 64),
                f.integer("layers", 1, MAX_LAYERS),
                f.integer("hidden", 1, MAX_WIDTH),
                f.integer("vocab", 1, MAX_WIDTH),
                f.integer("context", 1, MAX_CONTEXT),
                f.text("dtype", 16),  # type: ignore[arg-type]  # checked on construction
                f.text("license", 64),
                tuple(_file(item) for item in f.items("files", MAX_FILES)),
                shards,
                tuple(_unit(i, len(rows) - 2, row, shards) for i, row in enumerate(rows)),
                f.text("quantised", 16) if f.has("quantised") else None,  # type: ignore[arg-type]  # the same
            )
        if manifest.encode() != block:
            raise ManifestError("the manifest is not in canonical form: it encodes to other bytes")
        return manifest

    @property
    def cid(self) -> Cid:
        """The name of this manifest: the model's identity everywhere in this project."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def units_of(self, start: int, stop: int) -> tuple[Unit, ...]:
        """The units of a stage with layers [start, stop): the embedding goes with layer 0, the head with the last."""
        assert 0 <= start < stop <= self.n_layers, (start, stop, self.n_layers)
        first = 0 if start == 0 else start + 1
        last = self.n_layers + 2 if stop == self.n_layers else stop + 1
        return self.units[first:last]

    def file(self, path: str) -> File | None:
        """The small file of this path, or None if the model has none."""
        return next((file for file in self.files if file.path == path), None)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor that a unit's reference means."""
        return self.shards[ref.shard].tensors[ref.tensor]

    def _check_units(self) -> None:
        expected = [("embedding", 0, 0), *(("layer", i, i + 1) for i in range(self.n_layers))]
        expected.append(("head", self.n_layers, self.n_layers))
        found = [(unit.kind, unit.start, unit.stop) for unit in self.units]
        for want, got in zip(expected, found, strict=False):
            if want != got:
                raise ManifestError(f"units do not tile the model: expected {want}, found {got}")
        if len(found) != len(expected):
            raise ManifestError(f"{len(found)} units where {self.n_layers} layers need {len(expected)}")
        names: set[str] = set()
        used: set[tuple[int, int]] = set()
        for unit in self.units:
            if not unit.tensors:
                raise ManifestError(f"the unit {unit.kind} [{unit.start}, {unit.stop}) has no tensors")
            for ref in unit.tensors:
                check_name(ref.name)
                check_range(f"the shard of {ref.name!r}", ref.shard, 0, len(self.shards) - 1)
                check_range(f"the place of {ref.name!r}", ref.tensor, 0, len(self.shards[ref.shard].tensors) - 1)
                if ref.name in names:
                    raise ManifestError(f"two tensors are named {ref.name!r}")
                names.add(ref.name)
                used.add((ref.shard, ref.tensor))
        for i, shard in enumerate(self.shards):
            for k, tensor in enumerate(shard.tensors):
                if (i, k) not in used:
                    raise ManifestError(f"tensor {tensor.name!r} of shard {i} belongs to no unit")

    def _check_integers(self) -> None:
        """Integers mean weights only beside their scales, in a manifest that says so."""
        for unit in self.units:
            found = {ref.name: self.tensor(ref) for ref in unit.tensors}
            for name, tensor in found.items():
                if tensor.dtype in FLOATS:
                    continue
                scales = found.get(scale_of(name))
                wanted = scale_shape(tensor.dtype, tensor.shape)
                if self.quantised is None or wanted is None or scales is None:
                    what = f"{tensor.dtype} {list(tensor.shape)}"
                    raise ManifestError(f"tensor {name!r} of {what} is no quantised weight")
                if (scales.dtype, scales.shape) != ("bfloat16", wanted):
                    raise ManifestError(f"the scales of {name!r} are {scales.dtype} {list(scales.shape)}, not {wanted}")

    def _to_value(self) -> Value:
        scheme: dict[str, Value] = {} if self.quantised is None else {"quantised": self.quantised}
        return scheme | {
            "v": 1,
            "name": self.name,
            "type": self.model_type,
            "layers": self.n_layers,
            "hidden": self.hidden_size,
            "vocab": self.vocab_size,
            "context": self.context_length,
            "dtype": self.dtype,
            "license": self.license,
            "files": [[file.path, file.cid, file.size] for file in self.files],
            "shards": [[s.cid, Cid.of(Codec.DAG_CBOR, s.index()), s.size] for s in self.shards],
            "units": [[self._row(ref) for ref in unit.tensors] for unit in self.units],
        }

    def _row(self, ref: TensorRef) -> Value:
        own = self.tensor(ref).name == ref.name
        return [ref.shard, ref.tensor] if own else [ref.shard, ref.tensor, ref.name]


def check_model_name(name: str) -> None:
    """Returns if a model may be called so. Raises ManifestError."""
    if not _NAME.fullmatch(name):
        raise ManifestError(
            f"{name[:80]!r} is no name of a model: expected letters, digits, '.', '_', '-' and at most one '/', "
            f"such as smollm2-135m"
        )


def _shard(item: Value, get: Callable[[Cid], bytes]) -> Shard:
    match item:
        case [Cid() as root, Cid(codec=Codec.DAG_CBOR) as index, int(size)]:
            shard = Shard.from_index(get(index), root)
            if shard.size == size:
                return shard
    raise ManifestError(f"manifest.shards: not a shard: {str(item)[:200]}")


def _file(item: Value) -> File:
    match item:
        case [str(path), Cid() as cid, int(size)]:
            return File(path, cid, size)
    raise ManifestError(f"manifest.files: not a file: {str(item)[:200]}")


def _unit(place: int, n_layers: int, row: Value, shards: tuple[Shard, ...]) -> Unit:
    if not isinstance(row, list) or len(row) > MAX_TENSORS:
        raise ManifestError(f"manifest.units[{place}] is not a list of tensors")
    refs = tuple(_ref(item, shards) for item in row)
    if place == 0:
        return Unit("embedding", 0, 0, refs)
    if place > n_layers:
        return Unit("head", n_layers, n_layers, refs)
    return Unit("layer", place - 1, place, refs)


def _ref(item: Value, shards: tuple[Shard, ...]) -> TensorRef:
    match item:
        case [int(shard), int(tensor)] if 0 <= shard < len(shards) and 0 <= tensor < len(shards[shard].tensors):
            return TensorRef(shard, tensor, shards[shard].tensors[tensor].name)
        case [int(shard), int(tensor), str(name)] if len(name) <= MAX_NAME_CHARS:
            return TensorRef(shard, tensor, name)
    raise ManifestError(f"manifest.units: {str(item)[:100]} is no tensor of a shard")
