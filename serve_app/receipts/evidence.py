"""What a Head signs for a client whose request ends because two stages disagree about its rows.

Holds whatever was signed about these rows on their way, so that nobody needs the Head's word for who is at fault.
Law: `Evidence.decode(e.encode()) == e`. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from serve_app.receipts.identity import Session
from serve_app.receipts.statement import HASH_BYTES
from serve_app.receipts.transit import MAX_PROOF_BYTES, TransitProof
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope

ERROR_TYPE = "application/vnd.llmd.error.v1+dag-cbor"
MAX_EVIDENCE_BYTES = 4 * MAX_PROOF_BYTES
_MAX_ERROR = 4000  # characters


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a request ended. delivery: what its receiver refused; proof: a TransitProof. Both encoded, or empty."""

    request_hash: bytes
    error: str
    delivery: bytes = b""
    proof: bytes = b""

    def seal(self, session: Session) -> bytes:
        """Signed by the Head; the envelope, encoded."""
        return canonical.encode(session.seal(ERROR_TYPE, self.encode()).to_value())

    def encode(self) -> bytes:
        """The payload that is signed."""
        shown: dict[str, Value] = {k: v for k, v in (("delivery", self.delivery), ("proof", self.proof)) if v}
        return canonical.encode({"v": 1, "request": self.request_hash, "error": self.error[:_MAX_ERROR], **shown})

    @classmethod
    def decode(cls, payload: bytes) -> Evidence:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_EVIDENCE_BYTES), "evidence") as f:
            f.integer("v", 1, 1)
            request, error = f.data("request", HASH_BYTES, HASH_BYTES), f.text("error", _MAX_ERROR)
            shown = (f.data(k, 1, 2 * MAX_PROOF_BYTES) if f.has(k) else b"" for k in ("delivery", "proof"))
            return cls(request, error, *shown)


def shown_in(data: bytes) -> bytes:
    """The proof in the evidence that a client got, also as text; other bytes as they are. Raises FormatError.

    Who signed the evidence does not matter: the proof holds by itself, or not at all.
    """
    text = data.strip()
    try:
        plain = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        plain = data
    try:
        value = canonical.decode(plain, max_bytes=2 * MAX_EVIDENCE_BYTES)
        envelope = Envelope.from_value(value, "evidence", MAX_EVIDENCE_BYTES)
    except FormatError:
        return data
    if envelope.payload_type != ERROR_TYPE:
        raise FormatError(f"evidence: it is signed as {envelope.payload_type[:80]!r}")
    found = Evidence.decode(envelope.payload)
    if not found.proof:
        raise FormatError(f"evidence: it holds no proof, only the Head's word: {found.error}")
    return found.proof


def transit_proof(data: bytes) -> TransitProof | None:
    """The proof in these bytes; None if they say something of another kind. Raises FormatError."""
    value = canonical.decode(data, max_bytes=MAX_EVIDENCE_BYTES)
    return TransitProof.decode(data) if isinstance(value, dict) and "claim" in value else None
