"""The parts of a manifest: leaves, tensors, shards, units, small files; each refuses to exist broken.

A shard's byte form is its *index*: one DAG-CBOR block that names, for every tensor, dtype, shape and leaves.
What follows from that is not written and so cannot be wrong: offsets, sizes, the header, the file's root.
Law: `Shard.from_index(s.index(), s.cid) == s`; from_index refuses an index whose file has another root.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shard_tools import canonical, shard_file, unixfs
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import ManifestError
from shard_tools.shard_file import Dtype as Dtype
from shard_tools.shard_file import FloatDtype as FloatDtype

UnitKind = Literal["embedding", "layer", "head"]

MAX_BLOCK_BYTES = 2 << 20  # of a manifest or index: one block, as bitswap carries it
MAX_TENSORS = 1 << 16  # of one shard; the largest MoE layers, experts apart, have about 1,200
MAX_DIMENSIONS = 8
MAX_TENSOR_BYTES = 1 << 40
MAX_NAME_CHARS = 300
MAX_LAYERS = 1 << 12
MAX_FILE_BYTES = 64 << 20  # the largest tokenizer.json in use is about 35 MB

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,7}")
_DTYPES = tuple(shard_file.ITEM_BYTES)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One raw block of a shard: `size` bytes that all belong to one tensor, or to the file's header."""

    cid: Cid
    size: int

    def __post_init__(self) -> None:
        if self.cid.codec is not Codec.RAW:
            raise ManifestError(f"leaf {self.cid} is not a raw block")
        check_range("a leaf's size", self.size, 1, unixfs.LEAF_BYTES)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a shard. Bytes are little-endian, C-contiguous, at [offset, offset + size) of the file."""

    name: str  # as transformers names the parameter, e.g. model.layers.3.mlp.up_proj.weight
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    size: int
    leaves: tuple[Leaf, ...]  # tile [offset, offset + size) in order: all of LEAF_BYTES but the last

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.dtype not in _DTYPES:
            raise ManifestError(f"tensor {self.name!r} has dtype {self.dtype!r}; known are {', '.join(_DTYPES)}")
        if len(self.shape) > MAX_DIMENSIONS or any(not 0 < n < MAX_TENSOR_BYTES for n in self.shape):
            raise ManifestError(f"tensor {self.name!r} has the shape {list(self.shape)}")
        check_range(f"the size of tensor {self.name!r}", self.size, 1, MAX_TENSOR_BYTES)
        if self.size != shard_file.tensor_bytes(self.dtype, self.shape):
            raise ManifestError(
                f"tensor {self.name!r} has {self.size} bytes where {self.dtype} {list(self.shape)} takes "
                f"{shard_file.tensor_bytes(self.dtype, self.shape)}"
            )
        if tuple(leaf.size for leaf in self.leaves) != tuple(unixfs.leaf_sizes(self.size)):
            raise ManifestError(
                f"the {len(self.leaves)} leaves of tensor {self.name!r} do not tile its {self.size} bytes"
            )


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its UnixFS root, and every leaf of it (header, then tensors in file order)."""

    cid: Cid
    size: int  # of the file, bytes
    header: Leaf
    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        check_range("the tensors of a shard", len(self.tensors), 1, MAX_TENSORS)
        at = self.header.size
        for tensor in self.tensors:
            if tensor.offset != at:
                kind = "a gap" if tensor.offset > at else "an overlap"
                raise ManifestError(
                    f"shard {self.cid}: {kind} before {tensor.name!r}: it starts at {tensor.offset}, not {at}"
                )
            at += tensor.size
        if at != self.size:
            raise ManifestError(f"shard {self.cid}: its tensors end at {at}, its file at {self.size}")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ManifestError(f"shard {self.cid} has two tensors of one name")

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every leaf of the file, in order."""
        return (self.header, *(leaf for tensor in self.tensors for leaf in tensor.leaves))

    def index(self) -> bytes:
        """The index block of this shard."""
        return canonical.encode(
            {
                "v": 1,
                "tensors": [[t.name, t.dtype, list(t.shape), [leaf.cid for leaf in t.leaves]] for t in self.tensors],
            }
        )

    @classmethod
    def build(cls, tensors: Sequence[tuple[str, Dtype, tuple[int, ...], Sequence[Cid]]]) -> Shard:
        """The shard of tensors (name, dtype, shape, leaves) in file order; header, offsets and root are derived."""
        head = shard_file.header([(name, dtype, shape) for name, dtype, shape, _ in tensors])
        out, at = [], len(head)
        for name, dtype, shape, cids in tensors:
            size = shard_file.tensor_bytes(dtype, shape)
            sizes = tuple(unixfs.leaf_sizes(size)) if 0 < size <= MAX_TENSOR_BYTES else ()
            if len(sizes) != len(cids):
                raise ManifestError(f"tensor {name!r} of {size} bytes has {len(cids)} leaves, not {len(sizes)}")
            leaves = tuple(Leaf(cid, n) for cid, n in zip(cids, sizes, strict=True))
            out.append(Tensor(name, dtype, shape, at, size, leaves))
            at += size
        first = Leaf(Cid.of(Codec.RAW, head), len(head))
        leaves = (first, *(leaf for tensor in out for leaf in tensor.leaves))
        return cls(unixfs.tree_root([(leaf.cid, leaf.size) for leaf in leaves]), at, first, tuple(out))

    @classmethod
    def from_index(cls, block: bytes, root: Cid) -> Shard:
        """Read an index block. Raises FormatError, and ManifestError if it is not the index of the file `root`."""
        with Fields(canonical.decode(block, max_bytes=MAX_BLOCK_BYTES), "shard index") as f:
            f.integer("v", 1, 1)
            shard = cls.build([_tensor_row(row) for row in f.items("tensors", MAX_TENSORS)])
        if shard.cid != root:
            raise ManifestError(f"a shard's index describes the file {shard.cid}, its manifest names {root}")
        return shard


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

    def __post_init__(self) -> None:
        if len(self.path) > MAX_NAME_CHARS or not _PATH.fullmatch(self.path):
            raise ManifestError(f"{self.path[:80]!r} is no path of a file of a model")
        if self.cid.codec is Codec.DAG_CBOR:
            raise ManifestError(f"file {self.path} is no UnixFS file: {self.cid}")
        check_range(f"the size of file {self.path}", self.size, 0, MAX_FILE_BYTES)


def check_range(what: str, value: int, low: int, high: int) -> None:
    """Returns if value is in [low, high]. Raises ManifestError."""
    if isinstance(value, bool) or not low <= value <= high:
        raise ManifestError(f"{what} is {value}, not in [{low}, {high}]")


def check_name(name: str) -> None:
    """Returns if a tensor may be called so. Raises ManifestError."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isascii() or not name.isprintable():
        raise ManifestError(f"{name[:80]!r} is no name of a tensor")


def _tensor_row(row: Value) -> tuple[str, Dtype, tuple[int, ...], list[Cid]]:
    match row:
        case [str(name), str(dtype), list(shape), list(leaves)] if dtype in _DTYPES:
            check_name(name)
            dimensions = tuple(n for n in shape if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40)
            cids = [leaf for leaf in leaves if isinstance(leaf, Cid)]
            if len(dimensions) == len(shape) <= MAX_DIMENSIONS and len(cids) == len(leaves):
                return name, dtype, dimensions, cids
    raise ManifestError(f"a row of a shard index is no tensor: {str(row)[:200]}")
