"""What a stage shows an auditor of the rows it keeps, in pieces, signed by its session."""

from __future__ import annotations

import threading

from serve_app.audit.showing import PIECE_BYTES, shown_bytes
from serve_app.pipeline.retention import Retention
from serve_app.receipts.identity import Session


class Showing:
    """Of one stage's process. Its methods block for as long as copying takes."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self._lock = threading.Lock()
        self._last: tuple[tuple[bytes, int], bytes] | None = None  # what is being read; it is made once

    def piece(
        self, request: bytes, attempt: int, start: int, stage: int, session: Session, size: int = PIECE_BYTES
    ) -> bytes | None:
        """So many bytes of it from `start` on, or what is left; None if its rows are not here."""
        key = request, attempt
        with self._lock:
            if self._last is None or self._last[0] != key:
                record = self.retention.read(request, attempt)
                if record is None:
                    return None
                self._last = key, shown_bytes(request, attempt, stage, record, session)
            return self._last[1][start : start + size]

    def release(self, request: bytes, attempt: int, *, promised: bool) -> None:
        """It was read. What was not promised stays while there is room: others may share its beginning."""
        with self._lock:
            self._last = None
        if promised:
            self.retention.release(request, attempt)
