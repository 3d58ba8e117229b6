"""Two statements of one session that cannot both be honest: the proof that convicts its node, for anybody to check.

A session numbers its statements and names in each the one before (statement.py). So of two with one number, or of two
neighbours of which the later names another before it, one was signed to be shown to somebody else.
Law: `Equivocation.decode(e.encode()) == e`. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.receipts.identity import CERTIFICATE_TYPE, MAX_CERTIFICATE_BYTES, Certificate
from serve_app.receipts.statement import MAX_STATEMENT_BYTES, STATEMENT_TYPE, StageStatement
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid, Codec
from shard_tools.signing import Envelope, PublicKey

MAX_EQUIVOCATION_BYTES = 2 * MAX_STATEMENT_BYTES + MAX_CERTIFICATE_BYTES + 1024


@dataclass(frozen=True, slots=True)
class Equivocation:
    """first, second: envelopes of statements, in the order of their numbers, or of their bytes if these are equal."""

    certificate: Envelope  # of the session that signed both
    first: Envelope
    second: Envelope

    @classmethod
    def of(cls, certificate: Envelope, one: Envelope, other: Envelope) -> Equivocation | None:
        """What these two prove; None if they agree. Signatures are not looked at. Raises FormatError."""
        first, second = sorted((one, other), key=lambda e: (StageStatement.decode(e.payload).seq, e.payload))
        return cls(certificate, first, second) if _contradict(first, second) else None

    @property
    def cid(self) -> Cid:
        """Its name in a log."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def convicted(self) -> PublicKey:
        """The node that answers for both. Raises SignatureError, FormatError, ReceiptError if this proves nothing.

        The time does not matter: a session that has ended may not have lied either.
        """
        terms = Certificate.decode(self.certificate.payload)
        self.certificate.open(CERTIFICATE_TYPE, frozenset((terms.node,)), "the node that it names")
        for envelope in (self.first, self.second):
            envelope.open(STATEMENT_TYPE, frozenset((terms.session,)), "the certified session")
        if not _contradict(self.first, self.second):
            raise ReceiptError("equivocation: the two statements agree, and nobody is convicted by them")
        return terms.node

    def encode(self) -> bytes:
        """The bytes that a log names."""
        return canonical.encode(
            {
                "v": 1,
                "certificate": self.certificate.to_value(),
                "first": self.first.to_value(),
                "second": self.second.to_value(),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Equivocation:
        """Read a proof; `convicted` asks whether it is one. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_EQUIVOCATION_BYTES), "equivocation") as f:
            f.integer("v", 1, 1)
            return cls(
                Envelope.from_value(f.any("certificate"), "equivocation.certificate", MAX_CERTIFICATE_BYTES),
                Envelope.from_value(f.any("first"), "equivocation.first", MAX_STATEMENT_BYTES),
                Envelope.from_value(f.any("second"), "equivocation.second", MAX_STATEMENT_BYTES),
            )


def _contradict(first: Envelope, second: Envelope) -> bool:
    before, after = StageStatement.decode(first.payload), StageStatement.decode(second.payload)
    if before.seq == after.seq:
        return first.payload != second.payload
    return after.seq == before.seq + 1 and after.prev != hashlib.sha256(first.payload).digest()
