"""Where a model's tensors lie in the files it was published from, so that any web server with those files is a source.

A leaf of a shard holds bytes of one tensor alone. Where the tensor was stored in the same dtype and shape, the leaf is
a run of bytes of the original file: `range map` says which. It is trusted for nothing: what comes is hashed as ever,
and a wrong map finds no block. It lies beside a store's blocks, `ranges/<CID of the manifest>`, not in the manifest,
whose CID must not depend on how a checkpoint was cut into files. Described in FORMATS.md. Knows nothing of HTTP.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError, InputError
from shard_tools.manifest import Manifest
from shard_tools.store.hub import Span
from shard_tools.unixfs import LEAF_BYTES

MAX_BYTES = 16 << 20
MAX_FILES = 4096
MAX_PLACES = 1 << 20
MAX_OFFSET = 1 << 50

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")


@dataclass(frozen=True, slots=True)
class Place:
    """Tensor `tensor` of shard `shard` lies in files[file] from byte `offset` on, whole."""

    shard: int
    tensor: int
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class RangeMap:
    """Law: `RangeMap.decode(m.encode()) == m`."""

    manifest: Cid
    files: tuple[str, ...]
    places: tuple[Place, ...]  # sorted by shard and tensor

    def __post_init__(self) -> None:
        for file in self.files:
            if not _FILE.fullmatch(file):
                raise FormatError(f"a range map names the file {file[:80]!r}, which is no safetensors file of a folder")
        before = (-1, -1)
        for place in self.places:
            if not (place.file < len(self.files) and 0 <= place.offset <= MAX_OFFSET):
                raise FormatError(f"a range map has a place in no file: {place}")
            if (place.shard, place.tensor) <= before:
                raise FormatError("the places of a range map are not sorted by shard and tensor, or one is there twice")
            before = place.shard, place.tensor

    def encode(self) -> bytes:
        places: list[Value] = [[p.shard, p.tensor, p.file, p.offset] for p in self.places]
        files: list[Value] = list(self.files)
        return canonical.encode({"v": 1, "manifest": self.manifest, "files": files, "places": places})

    @classmethod
    def decode(cls, data: bytes) -> RangeMap:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_BYTES), "range map") as f:
            f.integer("v", 1, 1)
            return cls(
                f.link("manifest"),
                tuple(str(item)[:300] for item in f.items("files", MAX_FILES)),
                tuple(_place(item) for item in f.items("places", MAX_PLACES)),
            )

    def spans(self, model: Manifest) -> dict[Cid, Span]:
        """Of each leaf that lies in a file, where. Raises FormatError unless it is the map of this model."""
        if model.cid != self.manifest:
            raise FormatError(f"the range map is of manifest {self.manifest}, not of {model.cid}")
        out: dict[Cid, Span] = {}
        for p in self.places:
            if p.shard >= len(model.shards) or p.tensor >= len(model.shards[p.shard].tensors):
                raise FormatError(f"the range map of {self.manifest} has a place of no tensor: {p}")
            for i, leaf in enumerate(model.shards[p.shard].tensors[p.tensor].leaves):
                start = p.offset + i * LEAF_BYTES
                out.setdefault(leaf.cid, Span(self.files[p.file], start, start + leaf.size))
        return out


class RangeMaps:
    """The range maps beside a store's blocks."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "ranges"

    def path_of(self, manifest: Cid) -> Path:
        """The file of the map of this manifest, be it there or not."""
        return self._folder / str(manifest)

    def put(self, found: RangeMap) -> None:
        """The map is kept. Raises InputError."""
        path = self.path_of(found.manifest)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(found.encode())
            fresh.replace(path)
        except OSError as e:
            raise InputError(f"cannot keep a range map in {self._folder}: {e.strerror}") from e

    def forget(self, kept: frozenset[Cid]) -> None:
        """The maps of manifests that are not among these are gone."""
        for path in self._paths():
            with suppress(FormatError, OSError):  # somebody else's file
                if Cid.parse(path.name) not in kept:
                    path.unlink()

    def _paths(self) -> Iterator[Path]:
        if self._folder.is_dir():
            yield from self._folder.iterdir()


def read_map(path: Path) -> RangeMap:
    """The range map in a file. Raises InputError, FormatError."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise InputError(
            f"cannot read the range map {path}: {e.strerror}. `llmd publish` wrote it, as ranges/<manifest's CID>"
        ) from e
    return RangeMap.decode(data)


def _place(item: Value) -> Place:
    match item:
        case [int(shard), int(tensor), int(file), int(offset)] if min(shard, tensor, file, offset) >= 0:
            return Place(shard, tensor, file, offset)
    raise FormatError(f"a place of a range map: {str(item)[:100]} is none")
