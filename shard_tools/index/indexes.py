"""The indexes that a config can name; packages add others in the entry-point group `llmd.indexes`.

A factory takes the options of the config as keyword arguments and returns a ModelIndex.
"""

from __future__ import annotations

from shard_tools.choice import Choice, Table
from shard_tools.index.model_index import ModelIndex

INDEXES = Table("model index", "llmd.indexes", ModelIndex, {"directory": "shard_tools.index.directory:open_directory"})


def open_index(choice: Choice) -> ModelIndex:
    """The chosen index. Raises InputError."""
    index: ModelIndex = INDEXES.make(choice)
    return index
