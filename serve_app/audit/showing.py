"""The rows of one request as a stage shows them to an auditor: certificate, signed word (Disclosure), rows.

One byte string, read in pieces: u32 length of a DAG-CBOR map `{certificate, disclosure}`, the map, the encoded record.
Law: `Shown.open(shown_bytes(...), ...)` gives the record and the node. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from serve_app.errors import ProtocolError, ReceiptError
from serve_app.messages.record import StageRecord
from serve_app.receipts.disclosure import MAX_DISCLOSURE_BYTES, Disclosure
from serve_app.receipts.identity import MAX_CERTIFICATE_BYTES, Certificate, Registry, Session
from serve_app.receipts.statement import StageStatement
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.signing import Envelope, PublicKey

PIECE_BYTES = 8 << 20  # of one answer to an auditor
MAX_HEADER_BYTES = 4 << 10
_LENGTH = struct.Struct("<I")


def shown_bytes(request: bytes, attempt: int, stage: int, record: StageRecord, session: Session) -> bytes:
    """What a stage shows."""
    rows = record.encode()
    disclosure = Disclosure.of(request, attempt, stage, rows).seal(session)
    header = canonical.encode({"certificate": session.certificate.to_value(), "disclosure": disclosure.to_value()})
    return b"".join((_LENGTH.pack(len(header)), header, rows))


def most_bytes(n_rows: int, width: int) -> int:
    """How long it is at most: rows of float32, in and out."""
    return _LENGTH.size + MAX_HEADER_BYTES + 64 + n_rows * width * 8


@dataclass(frozen=True, slots=True)
class Shown:
    """Rows, and the node that answers for showing them."""

    record: StageRecord
    node: PublicKey

    @classmethod
    def open(cls, data: bytes, statement: StageStatement, registry: Registry, now_s: int) -> Shown:
        """What the node that signed this statement showed of its rows; whether they open it is not asked here.

        Raises ProtocolError, FormatError, SignatureError, ReceiptError.
        """
        size = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else 0
        if not 0 < size <= MAX_HEADER_BYTES or len(data) < _LENGTH.size + size:
            raise ProtocolError(f"{len(data)} bytes that do not begin with who shows them")
        header, rows = data[_LENGTH.size : _LENGTH.size + size], data[_LENGTH.size + size :]
        with Fields(canonical.decode(header, max_bytes=MAX_HEADER_BYTES), "shown") as f:
            certificate = Envelope.from_value(f.any("certificate"), "shown.certificate", MAX_CERTIFICATE_BYTES)
            disclosure = Envelope.from_value(f.any("disclosure"), "shown.disclosure", MAX_DISCLOSURE_BYTES)
        terms = Certificate.open(certificate, registry, "stage", now_s)
        if terms.node != statement.node:
            raise ReceiptError("another node shows them than signed for them")
        said = Disclosure.open(disclosure, terms.session)
        asked = statement.request_hash, statement.attempt, statement.stage
        if (said.request_hash, said.attempt, said.stage) != asked:
            raise ReceiptError("they are of another request, attempt or stage")
        if hashlib.sha256(rows).digest() != said.record:
            raise ReceiptError("they are not the rows that the stage signed for showing")
        return cls(StageRecord.decode(rows), terms.node)
