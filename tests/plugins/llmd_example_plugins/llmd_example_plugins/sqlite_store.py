"""Blocks as rows of one SQLite file, which many processes of one host may use at once."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from shard_tools.choice import absolute_path
from shard_tools.cid import Cid, Codec
from shard_tools.errors import InputError, NotFoundError
from shard_tools.store.block_store import check_block, check_size

_BUSY_S = 60.0  # how long a writer of another process is waited for; one block takes milliseconds


def open_sqlite(*, path: str) -> SqliteStore:
    """The store `{kind: sqlite, path: ...}` of a config. Raises InputError."""
    return SqliteStore(absolute_path(path))


def connect(path: Path) -> sqlite3.Connection:
    """The file, made if absent. Raises InputError if it is no database or cannot be one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
        connection.execute("CREATE TABLE IF NOT EXISTS blocks (cid TEXT PRIMARY KEY, block BLOB NOT NULL)")
        connection.execute("CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, record BLOB NOT NULL)")
    except (OSError, sqlite3.Error) as e:
        raise InputError(f"cannot keep blocks in {path}: {e}. Choose another file.") from e
    return connection


class SqliteStore:
    """Implements shard_tools.store.block_store.BlockStore."""

    def __init__(self, path: Path) -> None:
        self._path, self._connection = path, connect(path)
        self._lock = threading.Lock()  # one connection serves all threads of this process

    @property
    def label(self) -> str:
        return f"SQLite file {self._path}"

    def put(self, codec: Codec, block: bytes) -> Cid:
        check_size(block)
        cid = Cid.of(codec, block)
        self._run("INSERT OR REPLACE INTO blocks VALUES (?, ?)", str(cid), block)
        return cid

    def get(self, cid: Cid) -> bytes:
        rows = self._run("SELECT block FROM blocks WHERE cid = ?", str(cid))
        if not rows:
            raise NotFoundError(f"block {cid}", self.label)
        return check_block(cid, rows[0][0], self.label)

    def has(self, cid: Cid) -> bool:
        return bool(self._run("SELECT 1 FROM blocks WHERE cid = ?", str(cid)))

    def delete(self, cid: Cid) -> None:
        self._run("DELETE FROM blocks WHERE cid = ?", str(cid))

    def cids(self) -> Iterator[Cid]:
        for (name,) in self._run("SELECT cid FROM blocks"):
            yield Cid.parse(name)

    def _run(self, statement: str, *values: str | bytes) -> list[tuple]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as e:
            raise InputError(f"{self.label} does not answer: {e}") from e
