"""The seam between what needs blocks and where they lie.

Laws, which tests/contracts holds over every implementation:
  get(put(codec, b)) == b, whatever b;
  put is idempotent and leaves either the whole block or none of it;
  get returns only bytes that hash to the name asked for, else raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, InputError

MAX_BLOCK_BYTES = 2 << 20  # what bitswap and the public gateways carry (IPFS block limit)


class BlockSource(Protocol):
    """Gives blocks and keeps none: what reading a model needs. Every BlockStore is one."""

    @property
    def label(self) -> str:
        """What errors call this source, such as `peer http://10.0.0.7:8190`."""

    def get(self, cid: Cid) -> bytes:
        """The block of this name, hashed. Raises NotFoundError, CorruptBlockError, UnreachableError."""

    def has(self, cid: Cid) -> bool:
        """Whether the source says that it has the block. Raises UnreachableError."""


@dataclass(frozen=True, slots=True)
class Dag:
    """A file's blocks as a tree. size, leaves: of the whole file. wanted: leaves that are needed, and their sizes."""

    root: Cid
    size: int
    leaves: int
    wanted: Mapping[Cid, int]


@runtime_checkable
class DagSource(BlockSource, Protocol):
    """A BlockSource that gives many blocks for one question."""

    def get_dag(self, dag: Dag) -> Iterator[tuple[Cid, bytes]]:
        """Those wanted blocks that come in one stream, each hashed, each once; maybe none, for want of a stream.

        Raises what BlockSource.get raises, and FormatError, wherever the stream goes wrong; what came before is right.
        """


@runtime_checkable
class DagKeeper(BlockSource, Protocol):
    """A store that can fill itself from a DagSource."""

    def bring(self, dag: Dag, kept: Callable[[Cid], None]) -> None:
        """Those wanted blocks that come in one stream are here, and `kept` was told of each. Raises nothing: whoever
        needs the others gets them one by one.
        """


class BlockStore(Protocol):
    """Keeps blocks under the names their bytes have."""

    @property
    def label(self) -> str:
        """What errors call this store, such as `directory /var/llmd`."""

    def put(self, codec: Codec, block: bytes) -> Cid:
        """Keep the block. The store names it, so nobody can file bytes under a wrong name.

        Raises InputError past MAX_BLOCK_BYTES.
        """

    def get(self, cid: Cid) -> bytes:
        """The block of this name, hashed. Raises NotFoundError, CorruptBlockError."""

    def has(self, cid: Cid) -> bool:
        """Whether the block is here; its bytes are not read."""

    def delete(self, cid: Cid) -> None:
        """Forget the block; nothing happens if it is not here."""

    def cids(self) -> Iterator[Cid]:
        """Every block held, in no promised order."""


class CheckedBlock(bytes):
    """Bytes that were hashed and found to be those of `cid`; made by check_block alone, so that nobody hashes twice."""

    cid: Cid


def name_of(codec: Codec, block: bytes) -> Cid:
    """The name of a block: hashed, unless it is known to be right."""
    if isinstance(block, CheckedBlock) and block.cid.codec is codec:
        return block.cid
    return Cid.of(codec, block)


def check_size(block: bytes) -> None:
    """Returns if a store may keep the block. Raises InputError past MAX_BLOCK_BYTES."""
    if len(block) > MAX_BLOCK_BYTES:
        raise InputError(f"a block of {len(block)} bytes is not kept: at most {MAX_BLOCK_BYTES} travel in one piece")


def check_block(cid: Cid, block: bytes, label: str) -> CheckedBlock:
    """The block, if it hashes to the name asked for. Raises CorruptBlockError naming the store."""
    got = Cid.of(cid.codec, block)
    if got != cid:
        raise CorruptBlockError(cid, got, label)
    checked = CheckedBlock(block)
    checked.cid = cid
    return checked
