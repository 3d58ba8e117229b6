"""A receipt that says other tokens than the last stage signed for drawing: the proof that convicts its Head.

A Head reads the last stage's statement before it signs a receipt that names it. So two signatures are enough, and
nobody need compute anything. A client's check refuses such a receipt; this is what its refusal is worth to others.
That the sampling is another one is refused by the check alone: it is said in hashes that the prompt's opening is needed
for, which is not to be handed on.
Law: `Misquote.decode(m.encode()) == m`. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.identity import CERTIFICATE_TYPE, MAX_CERTIFICATE_BYTES, Certificate
from serve_app.receipts.receipt import MAX_RECEIPT_BYTES, Receipt
from serve_app.receipts.rows import ids_root
from serve_app.receipts.statement import MAX_STATEMENT_BYTES, STATEMENT_TYPE, StageStatement, envelope_cid
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid, Codec
from shard_tools.signing import Envelope, PublicKey

MAX_MISQUOTE_BYTES = MAX_RECEIPT_BYTES + MAX_STATEMENT_BYTES + 2 * MAX_CERTIFICATE_BYTES + 1024


@dataclass(frozen=True, slots=True)
class Misquote:
    """head, stage: the certificates of the sessions that signed receipt and statement."""

    head: Envelope
    stage: Envelope
    receipt: Envelope
    statement: Envelope  # the last that the receipt names

    @classmethod
    def of(cls, bundle: Bundle) -> Misquote | None:
        """What this bundle proves of its Head; None if nothing. Signatures are not looked at. Raises FormatError."""
        certificates = {Certificate.decode(envelope.payload).session: envelope for envelope in bundle.certificates}
        if not bundle.statements:
            return None
        statement = bundle.statements[-1]
        head, stage = certificates.get(bundle.receipt.key), certificates.get(statement.key)
        if head is None or stage is None or not _contradict(bundle.receipt, statement):
            return None
        return cls(head, stage, bundle.receipt, statement)

    @property
    def what(self) -> str:
        """Of what it convicts."""
        return "its Head signed for other tokens than the last stage drew"

    @property
    def cid(self) -> Cid:
        """Its name in a log."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def convicted(self) -> PublicKey:
        """The Head's node. Raises SignatureError, FormatError, ReceiptError if this proves nothing.

        The time does not matter: a session that has ended may not have lied either.
        """
        head, stage = _certified(self.head, "head"), _certified(self.stage, "stage")
        payload_type = Receipt.decode(self.receipt.payload).payload_type
        self.receipt.open(payload_type, frozenset((head.session,)), "the certified session")
        self.statement.open(STATEMENT_TYPE, frozenset((stage.session,)), "the certified session")
        if not _contradict(self.receipt, self.statement):
            raise ReceiptError("misquote: the receipt says the tokens that the last stage signed for, or names another")
        return head.node

    def encode(self) -> bytes:
        """The bytes that a log names."""
        return canonical.encode(
            {
                "v": 1,
                "head": self.head.to_value(),
                "stage": self.stage.to_value(),
                "receipt": self.receipt.to_value(),
                "statement": self.statement.to_value(),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Misquote:
        """Read a proof; `convicted` asks whether it is one. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_MISQUOTE_BYTES), "misquote") as f:
            f.integer("v", 1, 1)
            return cls(
                Envelope.from_value(f.any("head"), "misquote.head", MAX_CERTIFICATE_BYTES),
                Envelope.from_value(f.any("stage"), "misquote.stage", MAX_CERTIFICATE_BYTES),
                Envelope.from_value(f.any("receipt"), "misquote.receipt", MAX_RECEIPT_BYTES),
                Envelope.from_value(f.any("statement"), "misquote.statement", MAX_STATEMENT_BYTES),
            )


def decode_proof(data: bytes) -> Equivocation | Misquote:
    """A proof that convicts one node, of either kind. Raises FormatError."""
    value = canonical.decode(data, max_bytes=MAX_MISQUOTE_BYTES)
    return Misquote.decode(data) if isinstance(value, dict) and "receipt" in value else Equivocation.decode(data)


def _certified(certificate: Envelope, role: str) -> Certificate:
    terms = Certificate.decode(certificate.payload)
    certificate.open(CERTIFICATE_TYPE, frozenset((terms.node,)), "the node that it names")
    if terms.role != role:
        raise ReceiptError(f"misquote: a session of role {terms.role!r}, where {role!r} is to have signed")
    return terms


def _contradict(sealed: Envelope, said: Envelope) -> bool:
    receipt, statement = Receipt.decode(sealed.payload), StageStatement.decode(said.payload)
    if receipt.statements[-1:] != (envelope_cid(said),) or statement.stage != statement.n_stages - 1:
        return False
    drawn, place = statement.drawn, 0 if statement.drawn is None else statement.drawn.first - receipt.n_prompt
    if drawn is None or not 0 <= place <= len(receipt.out_ids):
        return False  # the check refuses it, and it is no word about these tokens
    return drawn.root != ids_root(receipt.manifest, receipt.out_ids[place:], drawn.first)
