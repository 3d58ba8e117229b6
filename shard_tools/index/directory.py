"""Names as small files: `<root>/names/<name>`, each one canonical record, replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

from shard_tools.choice import absolute_path
from shard_tools.cid import Cid
from shard_tools.errors import InputError, NotFoundError
from shard_tools.index.model_index import MAX_RECORD_BYTES, ModelRecord, check_present


def open_directory(*, path: str) -> DirectoryIndex:
    """The index `{kind: directory, path: ...}` of a config. Raises InputError for a relative path."""
    return DirectoryIndex(absolute_path(path))


class DirectoryIndex:
    """A ModelIndex in a directory."""

    def __init__(self, root: Path) -> None:
        self._names = root / "names"

    @property
    def label(self) -> str:
        return f"index {self._names}"

    def resolve(self, name: str) -> ModelRecord:
        try:
            with self._path(name).open("rb") as f:
                return ModelRecord.decode(f.read(MAX_RECORD_BYTES + 1))
        except OSError:
            known = ", ".join(self.names()[:20]) or "none"
            raise NotFoundError(f"the model {name[:200]!r}", self.label, f"Known: {known}.") from None

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        check_present(record, has, self.label)
        path = self._path(name)
        fresh = self._names / f".{os.getpid()}"
        try:
            self._names.mkdir(parents=True, exist_ok=True)
            os.sync()  # the blocks reach the disk before the name that needs them
            with fresh.open("wb") as f:
                f.write(record.encode())
                f.flush()
                os.fsync(f.fileno())
            fresh.replace(path)
            _sync_directory(self._names)
        except OSError as e:
            raise InputError(f"cannot name {name!r} in {self.label}: {e.strerror}. Nothing was named.") from e

    def names(self) -> tuple[str, ...]:
        if not self._names.is_dir():
            return ()
        return tuple(sorted(unquote(path.name) for path in self._names.iterdir() if not path.name.startswith(".")))

    def _path(self, name: str) -> Path:
        if not name or name.startswith(".") or len(name) > 200:
            raise InputError(f"{name[:80]!r} is no name of a model")
        return self._names / quote(name, safe="")


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
