"""A transparency log (log.py) on disk: what is in it is there before anybody is told, and it does not shrink unseen.

Two files in a folder: `log`, the entries one after another, all of one length; `log.head`, the last signed tree head.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from serve_app.errors import ReceiptError
from serve_app.receipts.log import MAX_HEAD_BYTES, Log, TreeHead
from shard_tools import canonical
from shard_tools.cid import Cid
from shard_tools.errors import InputError
from shard_tools.signing import Envelope, Signer

ENTRY_BYTES = 36  # a CIDv1 with a SHA-256 hash


class LogFile:
    """Appends for one signer; one process at a time has it open."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        """Read what is there. Raises InputError if it cannot be, ReceiptError if it was cut or rewritten."""
        self._path, self._head_path, self._signer = folder / "log", folder / "log.head", signer
        self.log = Log()
        self.index: dict[bytes, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            data = self._path.read_bytes() if self._path.exists() else b""
            whole = len(data) - len(data) % ENTRY_BYTES
            self._file = self._path.open("ab", buffering=0)  # what cannot be written is left nowhere
            self._file.truncate(whole)  # the last entry, of a process that died while it wrote; nobody was told of it
            head = self._head_path.read_bytes() if self._head_path.exists() else None
        except OSError as e:
            raise InputError(f"cannot keep a log in {folder}: {e.strerror}") from e
        for start in range(0, whole, ENTRY_BYTES):
            self._note(data[start : start + ENTRY_BYTES])
        self.sealed = None if head is None else self._checked(head)

    def append(self, entries: Iterable[Cid], at_ms: int) -> TreeHead:
        """They are in the log, each once, and on disk, and the log's head is signed. Raises InputError."""
        new = [entry for entry in dict.fromkeys(map(bytes, entries)) if entry not in self.index]
        assert all(len(entry) == ENTRY_BYTES for entry in new)
        try:
            left = memoryview(b"".join(new))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            for entry in new:
                self._note(entry)
            head = self.log.head(at_ms)
            self.sealed = head.seal(self._signer)
            beside = self._head_path.with_name("log.head.new")
            beside.write_bytes(canonical.encode(self.sealed.to_value()))
            beside.replace(self._head_path)
        except OSError as e:
            raise InputError(f"cannot write the log {self._path}: {e.strerror}. Make room on its disk") from e
        return head

    def close(self) -> None:
        """No more entries."""
        self._file.close()

    def _note(self, entry: bytes) -> None:
        self.index.setdefault(entry, self.log.append(entry))

    def _checked(self, data: bytes) -> Envelope:
        value = canonical.decode(data, max_bytes=4 * MAX_HEAD_BYTES)
        sealed = Envelope.from_value(value, "tree head", MAX_HEAD_BYTES)
        head = TreeHead.open(sealed, self._signer.public)
        if head.size > len(self.log) or self.log.root(head.size) != head.root:
            raise ReceiptError(
                f"log: {self._path} holds other entries than the {head.size} that {self._head_path} was signed for. "
                f"Restore it from a copy, or move both away to begin another log"
            )
        return sealed
