"""What a stage took in and gave for one whole request, as bytes: what it keeps, and shows to an auditor.

Law: `StageRecord.decode(r.encode()) == r`; decode raises ProtocolError for any other bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from serve_app.errors import ProtocolError

MAX_RECORD_BYTES = 1 << 32  # 2**17 rows of 16 KiB, in and out
_HEADER = struct.Struct("<IQQ")  # magic, bytes received, bytes sent
_MAGIC = 0x524D4C32


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The rows of positions 0 .. n-1 of one request at one stage, as they came in and as they went out."""

    received: bytes
    sent: bytes

    def encode(self) -> bytes:
        """One after the other, behind their lengths."""
        return b"".join((_HEADER.pack(_MAGIC, len(self.received), len(self.sent)), self.received, self.sent))

    @classmethod
    def decode(cls, data: bytes) -> StageRecord:
        """Read encode's bytes. Raises ProtocolError."""
        if not _HEADER.size <= len(data) <= MAX_RECORD_BYTES:
            raise ProtocolError(f"the rows of a request in {len(data)} bytes")
        magic, received, sent = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEADER.size + received + sent:
            raise ProtocolError("not the rows of a request, or cut short")
        start = _HEADER.size
        return cls(data[start : start + received], data[start + received :])
