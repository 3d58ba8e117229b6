"""The block stores that a config can name; packages add others in the entry-point group `llmd.stores`.

A factory takes the options of the config as keyword arguments and returns a BlockStore. It runs on every node.
"""

from __future__ import annotations

from shard_tools.choice import Choice, Table
from shard_tools.store.block_store import BlockStore

STORES = Table("block store", "llmd.stores", BlockStore, {"directory": "shard_tools.store.directory:open_directory"})


def open_store(choice: Choice) -> BlockStore:
    """The chosen store. Raises InputError."""
    store: BlockStore = STORES.make(choice)
    return store
