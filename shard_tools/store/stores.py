"""The block stores that a config can name; packages add others in the entry-point group `llmd.stores`.

A factory takes the options of the config as keyword arguments and returns a BlockStore. It runs on every node.
"""

from __future__ import annotations

from shard_tools.choice import Choice, Table
from shard_tools.store.block_store import BlockStore

_OURS = {"directory": "shard_tools.store.directory:open_directory"}
_OURS |= {kind: f"shard_tools.sources:open_{kind}" for kind in ("tiered", "peers", "gateway", "ipfs")}

STORES = Table("block store", "llmd.stores", BlockStore, _OURS)


def open_store(choice: Choice) -> BlockStore:
    """The chosen store. Raises InputError."""
    store: BlockStore = STORES.make(choice)
    return store
