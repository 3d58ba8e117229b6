"""Blocks as files of a directory: `<root>/blocks/<two characters>/<cid>`, mode 0644.

A block is written to `<root>/tmp` and renamed into place, so a killed writer leaves either the whole block or
nothing under its name. Blocks are not fsynced one by one (it would cost more than writing them): after a loss of
power a block may be empty or torn, which `get` finds by its hash and `put` heals by writing it again.
DirectoryIndex.publish flushes to disk before it names a model, so a *name* survives a loss of power.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shard_tools.choice import absolute_path
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError, NotFoundError
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block, check_size, name_of

_ABANDONED_S = 3600  # a temporary file this old has no writer left: one block takes milliseconds


def open_directory(*, path: str) -> DirectoryStore:
    """The store `{kind: directory, path: ...}` of a config. Raises InputError for a relative path."""
    return DirectoryStore(absolute_path(path))


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """A block of a directory. used_s: when it was put, or touched as used, in seconds since 1970."""

    cid: Cid
    size: int
    used_s: float


class DirectoryStore:
    """A BlockStore in a directory; many processes may use one directory at once."""

    def __init__(self, root: Path) -> None:
        """The store at `root`, made if absent. Raises InputError if it cannot be."""
        self._root = root
        self._blocks = root / "blocks"
        self._tmp = root / "tmp"
        self._serial = itertools.count()
        try:
            self._blocks.mkdir(parents=True, exist_ok=True)
            self._tmp.mkdir(exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot keep blocks in {root}: {e.strerror}. Choose another directory.") from e
        self._forget_abandoned()

    @classmethod
    def mirror(cls, root: Path) -> DirectoryStore:
        """A store of somebody else's: nothing is made or cleaned up there; it may come and go, as a network folder."""
        store = cls.__new__(cls)
        store._root, store._blocks, store._tmp = root, root / "blocks", root / "tmp"
        store._serial = itertools.count()
        return store

    @property
    def label(self) -> str:
        return f"directory {self._root}"

    def put(self, codec: Codec, block: bytes) -> Cid:
        check_size(block)
        cid = name_of(codec, block)
        path = self._path(cid)
        with suppress(OSError):
            if path.stat().st_size == len(block):  # a torn block, which has another length, is written again
                return cid
        fresh = self._tmp / f"{os.getpid()}-{id(self):x}-{next(self._serial)}"
        try:
            fresh.write_bytes(block)
            fresh.chmod(0o644)
            path.parent.mkdir(exist_ok=True)
            fresh.replace(path)
        except OSError as e:
            raise InputError(f"cannot write block {cid} to {self.label}: {e.strerror}. Nothing was lost.") from e
        finally:
            with suppress(OSError):
                fresh.unlink()  # is there only if the block is not: a full disk, or Ctrl-C
        return cid

    def get(self, cid: Cid) -> bytes:
        with self.open_block(cid) as f:
            try:
                block = f.read(MAX_BLOCK_BYTES + 1)
            except OSError as e:
                raise NotFoundError(f"block {cid}", self.label, f"It cannot be read: {e.strerror}.") from e
        return check_block(cid, block, self.label)

    def open_block(self, cid: Cid) -> io.FileIO:
        """The file of this block, open for reading; its bytes are not checked. Raises NotFoundError."""
        try:
            return self._path(cid).open("rb", buffering=0)
        except FileNotFoundError:
            raise NotFoundError(f"block {cid}", self.label) from None
        except OSError as e:
            raise NotFoundError(f"block {cid}", self.label, f"It cannot be read: {e.strerror}.") from e

    def has(self, cid: Cid) -> bool:
        return self._path(cid).exists()

    def delete(self, cid: Cid) -> None:
        try:
            self._path(cid).unlink(missing_ok=True)
        except OSError as e:
            raise InputError(f"cannot remove block {cid} from {self.label}: {e.strerror}") from e

    def cids(self) -> Iterator[Cid]:
        for directory in sorted(self._blocks.iterdir()):
            for path in sorted(directory.iterdir()):
                with suppress(FormatError):  # somebody else's file
                    yield Cid.parse(path.name)

    def held(self) -> Iterator[HeldBlock]:
        """Every block held, with size and age, in no promised order."""
        for directory in os.scandir(self._blocks):
            with os.scandir(directory.path) as entries:
                for entry in entries:
                    with suppress(FormatError, OSError):  # somebody else's file, or one that has just gone
                        stat = entry.stat()
                        yield HeldBlock(Cid.parse(entry.name), stat.st_size, stat.st_mtime)

    def touch(self, cid: Cid) -> None:
        """The block, if it is here, counts as used now."""
        with suppress(OSError):
            os.utime(self._path(cid))

    def _path(self, cid: Cid) -> Path:
        name = str(cid)
        return self._blocks / name[-3:-1] / name  # the last character carries 3 bits only

    def _forget_abandoned(self) -> None:
        limit = time.time() - _ABANDONED_S
        for path in self._tmp.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()
