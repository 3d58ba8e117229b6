"""The answers that were audited, on disk: what was found of one is known when the auditor has been started anew.

Three files in a folder. `answers`: cases one after another, u32 LE length and DAG-CBOR; when it is full it becomes
`answers.old`, whose cases are forgotten then, so that twice max_bytes are taken. `secrets`: those of draws that were
told, 32 bytes each. No prompt is written. What cannot be read any more, or written, is lost and logged: verdicts and
the log are elsewhere.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from serve_app.audit.case import MAX_CASE_BYTES, Case
from serve_app.audit.draw import SECRET_BYTES
from shard_tools.errors import FormatError
from shard_tools.signing import PublicKey

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")


def append_whole(path: Path, data: bytes, unit: int = 1) -> None:
    """All of it stands at the end of the file, or none: what comes later must not stand behind half a piece.

    unit: bytes of a piece; what is torn already is cut off first. Raises OSError.
    """
    with path.open("ab", buffering=0) as f:
        end = f.tell() - f.tell() % unit
        f.truncate(end)
        left = memoryview(data)
        try:
            while left:
                left = left[f.write(left) :]
        except OSError:
            f.truncate(end)
            raise


class AnswerFile:
    """One auditor's. `add` may be called by any thread."""

    def __init__(self, folder: Path, auditor: PublicKey, max_bytes: int) -> None:
        self._path, self._old, self._secrets = folder / "answers", folder / "answers.old", folder / "secrets"
        self._auditor, self._max_bytes = auditor, max_bytes
        self._lock = threading.Lock()

    def cases(self) -> Iterator[Case]:
        """From the oldest on."""
        for path in (self._old, self._path):
            yield from self._read(path)

    def add(self, case: Case) -> None:
        """It is there from now on, if the disk takes it."""
        data = case.encode()
        with self._lock:
            try:
                if self._path.exists() and self._path.stat().st_size + len(data) > self._max_bytes:
                    self._path.replace(self._old)
                append_whole(self._path, _LENGTH.pack(len(data)) + data)
            except OSError as e:
                _log.error("what was found of %s is not kept in %s: %s", case.id, self._path, e.strerror)

    def secrets(self) -> list[bytes]:
        """That were told."""
        try:
            data = self._secrets.read_bytes() if self._secrets.exists() else b""
        except OSError as e:
            _log.error("secrets of draws in %s are lost: %s", self._secrets, e.strerror)
            return []
        return [data[i : i + SECRET_BYTES] for i in range(0, len(data) - SECRET_BYTES + 1, SECRET_BYTES)]

    def tell(self, secrets: Iterable[bytes]) -> None:
        """These are told from now on, if the disk takes them."""
        told = b"".join(secrets)
        if not told:
            return
        try:
            append_whole(self._secrets, told, SECRET_BYTES)
        except OSError as e:
            _log.error("secrets of draws are not kept in %s: %s", self._secrets, e.strerror)

    def _read(self, path: Path) -> Iterator[Case]:
        """The cases up to the first that is none, behind which the file is cut off."""
        try:
            if not path.exists():
                return
            with path.open("r+b") as f:
                good = 0
                while header := f.read(_LENGTH.size):
                    size = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else 0
                    try:
                        if not 0 < size <= MAX_CASE_BYTES:
                            raise FormatError(f"{size} bytes are no case")
                        case = Case.decode(f.read(size), self._auditor)
                    except FormatError as e:
                        _log.error("from byte %d of %s on, answers are lost: %s", good, path, e)
                        f.truncate(good)
                        return
                    good = f.tell()
                    yield case
        except OSError as e:
            _log.error("answers in %s are lost: %s", path, e.strerror)
