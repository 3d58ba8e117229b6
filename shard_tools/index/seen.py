"""What this machine has seen of each name, so that an index cannot lead it back.

A name's version never goes down here, and one version never means two manifests. What is noted was signed by
publishers that were trusted then: whoever calls has checked it, or anybody could bar a name by a huge version.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import FormatError, InputError, RollbackError

_MAX_BYTES = 256
_MAX_VERSION = 1 << 53


class SeenVersions:
    """A folder with a small file per name; processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, name: str, version: int, manifest: Cid, who: str) -> None:
        """The version is noted as seen, if it is no step back. who: the index that led to it.

        Raises RollbackError; FormatError for a damaged note; InputError where none can be kept.
        """
        with self._alone():
            path = self._folder / quote(name, safe="")
            seen = _read(path)
            if seen is not None:
                newest, meant = seen
                if version < newest:
                    raise RollbackError(
                        f"{who} answers {name!r} with release {version}, and release {newest} was seen here before: an "
                        f"old release is passed off as new. Ask another index; to go back on purpose, delete {path}."
                    )
                if version == newest and manifest != meant:
                    raise RollbackError(
                        f"{who} answers {name!r} with manifest {manifest}, and release {version} was {meant} when "
                        f"it was seen here: its publisher signed two, and one of them for somebody else's eyes."
                    )
            if seen != (version, manifest):
                _write(path, version, manifest)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held for one small file's time
                yield
        except OSError as e:
            raise InputError(f"cannot remember the newest releases in {self._folder}: {e.strerror}") from e


def _read(path: Path) -> tuple[int, Cid] | None:
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        with Fields(canonical.decode(data, max_bytes=_MAX_BYTES), "note") as fields:
            fields.integer("v", 1, 1)
            return fields.integer("version", 1, _MAX_VERSION), fields.link("manifest")
    except FormatError as e:
        raise FormatError(f"the note {path} of the newest release seen is damaged ({e}); delete it to forget it") from e


def _write(path: Path, version: int, manifest: Cid) -> None:
    fresh = path.with_name(".fresh")
    with fresh.open("wb") as f:
        f.write(canonical.encode({"v": 1, "version": version, "manifest": manifest}))
        f.flush()
        os.fsync(f.fileno())
    fresh.replace(path)
