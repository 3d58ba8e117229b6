"""Names in this process's memory, for tests."""

from __future__ import annotations

from collections.abc import Callable

from shard_tools.cid import Cid
from shard_tools.errors import NotFoundError
from shard_tools.index.model_index import ModelRecord, check_present


class MemoryIndex:
    """A ModelIndex that forgets when the process ends."""

    def __init__(self) -> None:
        self._records: dict[str, ModelRecord] = {}

    @property
    def label(self) -> str:
        return "memory index"

    def resolve(self, name: str) -> ModelRecord:
        if name not in self._records:
            raise NotFoundError(f"the model {name[:200]!r}", self.label)
        return self._records[name]

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        check_present(record, has, self.label)
        self._records[name] = record

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._records))
