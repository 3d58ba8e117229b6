"""A stage's word of which rows it showed to an auditor, signed by its session.

With it, rows that do not open the stage's own statement convict it before anybody: two signatures of one node, that do
not go together. Without, an auditor could have made the rows up. Law: `Disclosure.decode(d.encode()) == d`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from serve_app.receipts.identity import Session
from serve_app.receipts.statement import HASH_BYTES, MAX_ATTEMPTS, MAX_STAGES
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.signing import Envelope, PublicKey

DISCLOSURE_TYPE = "application/vnd.llmd.disclosure.v1+dag-cbor"
MAX_DISCLOSURE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Disclosure:
    """record: SHA-256 of the encoded rows."""

    request_hash: bytes
    attempt: int
    stage: int
    record: bytes

    @classmethod
    def of(cls, request_hash: bytes, attempt: int, stage: int, record: bytes) -> Disclosure:
        """Of these encoded rows."""
        return cls(request_hash, attempt, stage, hashlib.sha256(record).digest())

    def encode(self) -> bytes:
        """The payload that is signed."""
        said: canonical.Value = {
            "v": 1,
            "request": self.request_hash,
            "attempt": self.attempt,
            "stage": self.stage,
            "record": self.record,
        }
        return canonical.encode(said)

    @classmethod
    def decode(cls, payload: bytes) -> Disclosure:
        """Read a payload. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_DISCLOSURE_BYTES), "disclosure") as f:
            f.integer("v", 1, 1)
            return cls(
                f.data("request", HASH_BYTES, HASH_BYTES),
                f.integer("attempt", 0, MAX_ATTEMPTS),
                f.integer("stage", 0, MAX_STAGES - 1),
                f.data("record", HASH_BYTES, HASH_BYTES),
            )

    def seal(self, session: Session) -> Envelope:
        """As the stage signs it."""
        return session.seal(DISCLOSURE_TYPE, self.encode())

    @classmethod
    def open(cls, envelope: Envelope, session: PublicKey) -> Disclosure:
        """Signed by this session. Raises SignatureError, FormatError."""
        return cls.decode(envelope.open(DISCLOSURE_TYPE, frozenset((session,)), "the stage's session"))
