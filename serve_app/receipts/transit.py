"""Two neighbours disagree about rows: who is at fault, and what shows it to anybody.

    sender:   Sent      "these are all rows that I sent, and I delivered them with step s"
    receiver: Received  "these are all rows that I received", with the sender's delivery of them inside

Each signs its own for a sequence that ends, before anybody compares; a receipt holds neither. An honest receiver says
nothing that the sender has not signed for, so a Received that its own delivery does not bear convicts whoever signed
it; and an honest sender delivers and says the same, so two signatures of its that differ convict it. Of two stages with
different roots one has done one of these, or has signed nothing and is named by the Head's word alone.
A stage signs one delivery a step, whatever its Head sends it: two are a lie too.
Laws: `TransitProof.decode(p.encode()) == p`; no honest stage is convicted, whatever its Head and its neighbours do.
Bytes: PROTOCOL.md. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.receipts.delivery import (
    DELIVERY_TYPE,
    MAX_NUMBER,
    MAX_PARTS,
    Delivery,
    Part,
    Vouched,
    certified,
    require_part,
    take_path,
)
from serve_app.receipts.identity import MAX_CERTIFICATE_BYTES, MAX_EPOCH, Session
from serve_app.receipts.statement import HASH_BYTES, MAX_ATTEMPTS, MAX_ROWS, MAX_STAGES, manifest_link
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import LlmdError, SignatureError
from shard_tools.signing import Envelope, PublicKey

SENT_TYPE = "application/vnd.llmd.sent.v1+dag-cbor"
RECEIVED_TYPE = "application/vnd.llmd.received.v1+dag-cbor"
MAX_CLAIM_BYTES = 8 << 10  # a certificate of 1 KiB, a delivery and a path of some 20 hashes, with room to spare
MAX_PROOF_BYTES = 2 * MAX_CLAIM_BYTES


@dataclass(frozen=True, slots=True)
class Opened:
    """A delivery, and where in it a part stands."""

    vouched: Vouched
    index: int
    path: tuple[bytes, ...]

    def bears(self, part: Part, manifest: Cid, epoch: int, stage: int) -> tuple[PublicKey, Delivery]:
        """The session that signed for this very part as what that stage sent. Raises LlmdError if none did."""
        terms, said = self.vouched.opened()
        if (said.manifest, said.epoch, said.stage) != (manifest, epoch, stage):
            raise ReceiptError(f"delivery: it is of stage {said.stage} in epoch {said.epoch}, or of another model")
        require_part(part, self.index, self.path, said)
        return terms.session, said

    def fields(self) -> dict[str, Value]:
        """As a part of a map."""
        return {**self.vouched.fields(), "index": self.index, "path": list(self.path)}

    @classmethod
    def take(cls, f: Fields) -> Opened:
        """Read `fields` out of a map. Raises FormatError."""
        return cls(Vouched.take(f), f.integer("index", 0, MAX_PARTS - 1), take_path(f))


@dataclass(frozen=True, slots=True)
class Sent:
    """All rows of a sequence that has ended, as their sender says it."""

    manifest: Cid
    epoch: int
    stage: int
    step: int  # whose delivery says so too
    part: Part

    def seal(self, session: Session) -> Envelope:
        """Signed by the sender."""
        return session.seal(SENT_TYPE, canonical.encode({**_head(self), "step": self.step}))

    @classmethod
    def decode(cls, payload: bytes) -> Sent:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_CLAIM_BYTES), "sent") as f:
            manifest, epoch, stage, part = _take_head(f)
            return cls(manifest, epoch, stage, f.integer("step", 0, MAX_NUMBER), part)


@dataclass(frozen=True, slots=True)
class Received:
    """All rows of a sequence that has ended, as their receiver says it and shows that they were delivered."""

    manifest: Cid
    epoch: int
    stage: int
    part: Part
    opened: Opened

    def seal(self, session: Session) -> Envelope:
        """Signed by the receiver."""
        return session.seal(RECEIVED_TYPE, canonical.encode({**_head(self), **self.opened.fields()}))

    @classmethod
    def decode(cls, payload: bytes) -> Received:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_CLAIM_BYTES), "received") as f:
            return cls(*_take_head(f), Opened.take(f))

    def sender(self) -> tuple[PublicKey, Delivery]:
        """The session that delivered these rows, and with what. Raises LlmdError if none did."""
        return self.opened.bears(self.part, self.manifest, self.epoch, self.stage - 1)


def _head(claim: Sent | Received) -> dict[str, Value]:
    part = claim.part
    return {
        "v": 1,
        "manifest": claim.manifest,
        "epoch": claim.epoch,
        "stage": claim.stage,
        "seq": part.seq,
        "request": part.request_hash,
        "attempt": part.attempt,
        "rows": part.rows,
        "root": part.root,
    }


def _take_head(f: Fields) -> tuple[Cid, int, int, Part]:
    f.integer("v", 1, 1)
    manifest, epoch = manifest_link(f), f.integer("epoch", 0, MAX_EPOCH)
    stage = f.integer("stage", 0, MAX_STAGES - 1)
    part = Part(
        seq=f.integer("seq", 0, MAX_NUMBER),
        request_hash=f.data("request", HASH_BYTES, HASH_BYTES),
        attempt=f.integer("attempt", 0, MAX_ATTEMPTS),
        rows=f.integer("rows", 1, MAX_ROWS),
        last=True,
        root=f.data("root", HASH_BYTES, HASH_BYTES),
    )
    return manifest, epoch, stage, part


@dataclass(frozen=True, slots=True)
class TransitProof:
    """What convicts one stage of a transit, for anybody to check. claim: Sent, Received, or one of two deliveries."""

    certificate: Envelope  # of the session that signed the claim
    claim: Envelope
    # Against a Sent: the root that its own delivery of that step has, and where. Against a delivery: the other one.
    root: bytes = b""
    against: Opened | None = None

    @property
    def cid(self) -> Cid:
        """Its name in a log."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def convicted(self) -> PublicKey:
        """The node that answers for it. Raises SignatureError, FormatError, ReceiptError if this proves nothing.

        The time does not matter: a session that has ended may not have lied either.
        """
        terms = certified(self.certificate)
        if self.claim.payload_type not in (SENT_TYPE, RECEIVED_TYPE, DELIVERY_TYPE):
            raise SignatureError(f"expected words about rows on their way, found {self.claim.payload_type[:80]!r}")
        payload = self.claim.open(self.claim.payload_type, frozenset((terms.session,)), "the certified session")
        if self.claim.payload_type == RECEIVED_TYPE:
            self._require_unborne(Received.decode(payload))
        elif self.claim.payload_type == SENT_TYPE:
            self._require_otherwise(Sent.decode(payload), terms.session)
        else:
            self._require_second(Delivery.decode(payload), terms.session)
        return terms.node

    def _require_unborne(self, said: Received) -> None:
        if self.against is not None or self.root:
            raise ReceiptError("transit: what a receiver says convicts it by itself or not at all")
        try:
            said.sender()
        except LlmdError:
            return
        raise ReceiptError(f"transit: stage {said.stage - 1} has signed for the rows that stage {said.stage} received")

    def _require_otherwise(self, said: Sent, session: PublicKey) -> None:
        if self.against is None or len(self.root) != HASH_BYTES:
            raise ReceiptError("transit: the delivery that a sender contradicts is missing")
        p = said.part
        other = Part(p.seq, p.request_hash, p.attempt, p.rows, p.last, self.root)
        by, delivery = self.against.bears(other, said.manifest, said.epoch, said.stage)
        if by != session or delivery.step != said.step:
            raise ReceiptError("transit: the delivery is another session's or of another step: it contradicts nothing")
        if self.root == p.root:
            raise ReceiptError(f"transit: stage {said.stage} delivered what it says, and nobody is convicted")

    def _require_second(self, said: Delivery, session: PublicKey) -> None:
        if self.against is None or self.against.path or self.against.index or self.root:
            raise ReceiptError("transit: the other delivery is missing, or more is there than belongs to it")
        terms, other = self.against.vouched.opened()
        if terms.session != session or other.step != said.step or other == said:
            raise ReceiptError("transit: these are not two deliveries of one session for one step")

    @property
    def what(self) -> str:
        """What it shows, for people. Raises FormatError."""
        payload = self.claim.payload
        if self.claim.payload_type == DELIVERY_TYPE:
            said = Delivery.decode(payload)
            return f"signed two deliveries for step {said.step}, as stage {said.stage}"
        if self.claim.payload_type == SENT_TYPE:
            sent = Sent.decode(payload)
            request = sent.part.request_hash.hex()
            return f"delivered other rows than it says that it sent, as stage {sent.stage}, of request {request}"
        got = Received.decode(payload)
        request = got.part.request_hash.hex()
        return f"claims rows that were not delivered to it, as stage {got.stage}, of request {request}"

    def encode(self) -> bytes:
        """The bytes that a log names."""
        against = None if self.against is None else self.against.fields()
        return canonical.encode(
            {
                "v": 1,
                "certificate": self.certificate.to_value(),
                "claim": self.claim.to_value(),
                "root": self.root,
                "against": against,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> TransitProof:
        """Read a proof; `convicted` asks whether it is one. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_PROOF_BYTES), "transit proof") as f:
            f.integer("v", 1, 1)
            certificate = Envelope.from_value(f.any("certificate"), "certificate", MAX_CERTIFICATE_BYTES)
            claim = Envelope.from_value(f.any("claim"), "claim", MAX_CLAIM_BYTES)
            root, value, against = f.data("root", 0, HASH_BYTES), f.any("against"), None
            if value is not None:
                with Fields(value, "against") as a:
                    against = Opened.take(a)
            return cls(certificate, claim, root, against)


def twice(vouched: Vouched, other: Vouched) -> TransitProof | None:
    """What two deliveries prove of the session that signed both, if that is anything. Raises FormatError."""
    first, second = sorted((vouched, other), key=lambda v: v.delivery.payload)
    proof = TransitProof(first.certificate, first.delivery, b"", Opened(second, 0, ()))
    try:
        proof.convicted()
    except (SignatureError, ReceiptError):
        return None
    return proof


@dataclass(frozen=True, slots=True)
class Side:
    """One of two neighbours, as it told the Head: what it says of the rows between them, and what it signed."""

    stage: int
    certificate: Envelope
    rows: int
    root: bytes
    claim: bytes  # encoded envelope; empty if it gave none


@dataclass(frozen=True, slots=True)
class Blame:
    """Who is at fault. proof: for anybody; None: it is the Head's word, of a stage that did not sign what it should."""

    stage: int
    why: str
    proof: TransitProof | None = None


def decide(seq: int, sender: Side, receiver: Side) -> Blame | None:
    """Of two that told a Head different roots of the same sequence. None: none signs for what it sends."""
    if not sender.claim and not receiver.claim:
        return None
    try:
        sent_envelope, sent = _claim(sender, SENT_TYPE), None
        sent = Sent.decode(sent_envelope.payload)
        _require_told(sent, seq, sender)
    except LlmdError as e:
        return Blame(sender.stage, f"it did not sign for what it says that it sent: {e}")
    try:
        got_envelope = _claim(receiver, RECEIVED_TYPE)
        got = Received.decode(got_envelope.payload)
        _require_told(got, seq, receiver)
    except LlmdError as e:
        return Blame(receiver.stage, f"it did not sign for what it says that it received: {e}")
    try:
        session, delivery = got.sender()
    except LlmdError as e:
        why = f"it claims rows that stage {sender.stage} did not deliver: {e}"
        return Blame(receiver.stage, why, TransitProof(receiver.certificate, got_envelope))
    if session != sent_envelope.key:
        return Blame(receiver.stage, f"it shows a delivery that is not by the session of stage {sender.stage}")
    proof = TransitProof(sender.certificate, sent_envelope, got.part.root, got.opened)
    try:
        proof.convicted()
    except LlmdError as e:  # the Head knows that a number is given once: one of the two words is a lie all the same
        return Blame(sender.stage, f"it delivered the rows that stage {receiver.stage} received, and says other: {e}")
    return Blame(sender.stage, f"it signed two roots for the rows that it sent with step {delivery.step}", proof)


def _claim(side: Side, payload_type: str) -> Envelope:
    if not side.claim:
        raise ReceiptError("no word came")
    value = canonical.decode(side.claim, max_bytes=2 * MAX_CLAIM_BYTES)
    envelope = Envelope.from_value(value, "claim", MAX_CLAIM_BYTES)
    envelope.open(payload_type, frozenset((certified(side.certificate).session,)), f"stage {side.stage}")
    return envelope


def _require_told(claim: Sent | Received, seq: int, side: Side) -> None:
    """It is about what the Head was told of: this sequence, and that root."""
    part, epoch = claim.part, certified(side.certificate).epoch
    if (part.seq, part.rows, part.root, claim.stage, claim.epoch) != (seq, side.rows, side.root, side.stage, epoch):
        raise ReceiptError("what it signed is not what it told the Head")
