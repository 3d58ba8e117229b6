"""The indexes that a config can name; packages add others in the entry-point group `llmd.indexes`.

A factory takes the options of the config as keyword arguments and returns a ModelIndex.
"""

from __future__ import annotations

from shard_tools.choice import Choice, Table
from shard_tools.index.model_index import ModelIndex

_OURS = {kind: f"shard_tools.index.{kind}:open_{kind}" for kind in ("directory", "http", "ipns")}

INDEXES = Table("model index", "llmd.indexes", ModelIndex, _OURS)


def open_index(choice: Choice) -> ModelIndex:
    """The chosen index. Raises InputError."""
    index: ModelIndex = INDEXES.make(choice)
    return index
