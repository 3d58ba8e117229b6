"""Blocks in this process's memory: for tests, and the reference of what a store is."""

from __future__ import annotations

from collections.abc import Iterator

from shard_tools.cid import Cid, Codec
from shard_tools.errors import NotFoundError
from shard_tools.store.block_store import check_block, check_size, name_of


class MemoryStore:
    """A BlockStore that forgets when the process ends."""

    def __init__(self) -> None:
        self.blocks: dict[Cid, bytes] = {}  # open to tests that corrupt one

    @property
    def label(self) -> str:
        return "memory"

    def put(self, codec: Codec, block: bytes) -> Cid:
        check_size(block)
        cid = name_of(codec, block)
        self.blocks[cid] = bytes(block)
        return cid

    def get(self, cid: Cid) -> bytes:
        block = self.blocks.get(cid)
        if block is None:
            raise NotFoundError(f"block {cid}", self.label)
        return check_block(cid, block, self.label)

    def has(self, cid: Cid) -> bool:
        return cid in self.blocks

    def delete(self, cid: Cid) -> None:
        self.blocks.pop(cid, None)

    def cids(self) -> Iterator[Cid]:
        yield from list(self.blocks)
