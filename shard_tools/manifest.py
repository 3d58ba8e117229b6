"""What a model is: which bytes hold which tensor, and which tensors make which unit.

A *shard* is one safetensors file. A *unit* is what a stage can own: the embedding, one decoder layer, or
the head (final norm and output projection). A unit is a list of tensors, each in some shard: a tied head
names a tensor of the embedding's shard, so the bytes are stored once. Units tile the model exactly:
embedding, layers 0 .. n-1, head, in that order.

Law: `Manifest.decode(m.encode()) == m`, and the bytes are the same on any machine.
The byte form is described in FORMATS.md. Knows nothing of stores, signatures, torch or the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NewType

from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import ManifestError

Dtype = Literal["float32", "bfloat16", "float16"]
UnitKind = Literal["embedding", "layer", "head"]
ModelName = NewType("ModelName", str)

MAX_MANIFEST_BYTES = 2 << 20  # one block; 100k tensors would need a tree (FORMATS.md)
PAYLOAD_TYPE = "application/vnd.llmd.manifest.v1+dag-cbor"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One raw block of a shard: `size` bytes that all belong to one tensor, or to the file's header."""

    cid: Cid
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a shard. Bytes are little-endian, C-contiguous, at [offset, offset + size) of the file."""

    name: str  # as transformers names the parameter, e.g. model.layers.3.mlp.up_proj.weight
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    size: int
    leaves: tuple[Leaf, ...]  # tile [offset, offset + size) in order


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its UnixFS root, and every leaf of it (header, then tensors in file order)."""

    cid: Cid
    size: int  # of the file, bytes
    header: Leaf
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a unit: shards[shard].tensors[tensor], known to the module as `name`.

    `name` differs from the tensor's own only where one tensor serves twice (tied embeddings).
    """

    shard: int
    tensor: int
    name: str


@dataclass(frozen=True, slots=True)
class Unit:
    """What a stage can own. start, stop: half-open range of decoder layers; empty for embedding and head."""

    kind: UnitKind
    start: int
    stop: int
    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class File:
    """A small file that travels with the model (config.json, tokenizer.json ...). UnixFS, unixfs-v1-2025."""

    path: str
    cid: Cid
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One whole model. Constructing one with a gap, an overlap or an unknown dtype raises ManifestError."""

    name: ModelName
    model_type: str  # transformers' config.model_type
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int  # tokens
    dtype: Dtype  # of the activations between stages; shards may hold some tensors in others
    license: str  # SPDX id, or empty if the source does not say
    files: tuple[File, ...]  # sorted by path
    shards: tuple[Shard, ...]
    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        raise NotImplementedError

    def encode(self) -> bytes:
        """The block of this manifest."""
        raise NotImplementedError

    @classmethod
    def decode(cls, block: bytes) -> Manifest:
        """Read a manifest block. Raises FormatError, ManifestError."""
        raise NotImplementedError

    @property
    def cid(self) -> Cid:
        """The name of this manifest: the model's identity everywhere in this project."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def units_of(self, start: int, stop: int) -> tuple[Unit, ...]:
        """The units of a stage with layers [start, stop): the embedding goes with layer 0, the head with the last."""
        raise NotImplementedError

    def file(self, path: str) -> File | None:
        """The small file of this path, or None if the model has none."""
        raise NotImplementedError
