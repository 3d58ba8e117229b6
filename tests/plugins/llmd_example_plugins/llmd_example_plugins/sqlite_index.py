"""Names as rows of the same SQLite file as the blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from llmd_example_plugins.sqlite_store import connect
from shard_tools.choice import absolute_path
from shard_tools.cid import Cid
from shard_tools.errors import InputError, NotFoundError
from shard_tools.index.model_index import ModelRecord, check_present


def open_sqlite(*, path: str) -> SqliteIndex:
    """The index `{kind: sqlite, path: ...}` of a config. Raises InputError."""
    return SqliteIndex(absolute_path(path))


class SqliteIndex:
    """Implements shard_tools.index.model_index.ModelIndex."""

    def __init__(self, path: Path) -> None:
        self._path, self._connection = path, connect(path)

    @property
    def label(self) -> str:
        return f"names in {self._path}"

    def resolve(self, name: str) -> ModelRecord:
        row = self._connection.execute("SELECT record FROM names WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFoundError(f"the model {name[:200]!r}", self.label)
        return ModelRecord.decode(row[0])

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        check_present(record, has, self.label)
        try:
            self._connection.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, record.encode()))
        except sqlite3.Error as e:
            raise InputError(f"cannot name {name!r} in {self.label}: {e}. Nothing was named.") from e

    def names(self) -> tuple[str, ...]:
        return tuple(name for (name,) in self._connection.execute("SELECT name FROM names ORDER BY name"))
