"""The seam between the names people use and the manifests they mean.

Laws: resolve(name) is the record last published under it;
  publish either names a record whose blocks are there, or changes nothing.
A record carries no trust of its own: the signature it points to is checked by whoever opens the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import NotFoundError

MAX_RECORD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What a name points at. Law: decode(encode(r)) == r."""

    manifest: Cid
    signature: Cid

    def encode(self) -> bytes:
        return canonical.encode({"v": 1, "manifest": self.manifest, "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> ModelRecord:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_RECORD_BYTES), "name record") as f:
            f.integer("v", 1, 1)
            return cls(f.link("manifest"), f.link("signature"))


class NameSource(Protocol):
    """Leads from names to records: what opening a model needs. Every ModelIndex is one."""

    @property
    def label(self) -> str:
        """What errors call this index."""

    def resolve(self, name: str) -> ModelRecord:
        """The record of this name. Raises NotFoundError, FormatError, UnreachableError."""


class ModelIndex(Protocol):
    """Keeps records under names."""

    @property
    def label(self) -> str:
        """What errors call this index."""

    def resolve(self, name: str) -> ModelRecord:
        """The record of this name. Raises NotFoundError, FormatError."""

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        """Name the record, as the last act. has: of the store beside this index.

        Raises NotFoundError, and names nothing, if the record's blocks are not there.
        """

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""


def check_present(record: ModelRecord, has: Callable[[Cid], bool], where: str) -> None:
    """Returns if both blocks of the record are held. Raises NotFoundError."""
    for what, cid in (("manifest", record.manifest), ("signature", record.signature)):
        if not has(cid):
            raise NotFoundError(f"{what} {cid}", f"the store beside {where}", "Nothing was named.")
