"""What the sender of a step message signs for the rows in it, so that none of two neighbours can deny it afterwards.

One signature a message, over the root of a tree with one *part* for each sequence that had rows in it or ends in it.
A part speaks of *all* rows of its sequence from position 0 on, by the root that a statement would have: so one delivery
proves the whole of a sequence, shared beginnings too, and none must be combined with those before it. The part of the
message that ends a sequence is its last one and says so.
Laws: `Delivery.decode(d.encode()) == d`, `DeliveryNote.decode(n.encode()) == n`, and every other byte string raises.
Bytes: PROTOCOL.md. Knows nothing of how rows are hashed, nor of numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.receipts.identity import CERTIFICATE_TYPE, MAX_CERTIFICATE_BYTES, MAX_EPOCH, Certificate, Session
from serve_app.receipts.log import MAX_PROOF, Log, TreeHead, require_included
from serve_app.receipts.statement import HASH_BYTES, MAX_ATTEMPTS, MAX_ROWS, MAX_STAGES, manifest_link
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope

DELIVERY_TYPE = "application/vnd.llmd.delivery.v1+dag-cbor"
MAX_DELIVERY_BYTES = 256
MAX_PARTS = 1 << 17  # of one message: as many sequences as a plan can run, and as many as it can close
MAX_NUMBER = (1 << 63) - 1  # of steps and sequences

_PART = struct.Struct("<14sQ32sIIB32s")  # tag, sequence, request, attempt, rows, whether it is the last, root
_TAG = b"llmd.part.v1\0\0"
_MAGIC = 0x444D4C31  # another than that of the step messages, which take the same edge
_NOTE = struct.Struct("<III")  # magic, parts, bytes of the envelopes
_START = _MAGIC.to_bytes(4, "little")
_MAX_ENVELOPES_BYTES = MAX_CERTIFICATE_BYTES + MAX_DELIVERY_BYTES + 1024


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one sequence, from position 0 on, that had been sent with this message and those before it."""

    seq: int  # the Head's number for it, unique in an epoch
    request_hash: bytes
    attempt: int
    rows: int  # that count for sure: without guesses
    last: bool  # the sequence ends here: nothing follows these rows
    root: bytes  # over these rows, as in a statement

    def encode(self) -> bytes:
        """95 bytes: what a leaf of the tree is the hash of."""
        return _PART.pack(_TAG, self.seq, self.request_hash, self.attempt, self.rows, self.last, self.root)

    @classmethod
    def decode(cls, data: bytes) -> Part:
        """Read encode's bytes. Raises FormatError."""
        if len(data) != _PART.size:
            raise FormatError(f"delivery part: {len(data)} bytes, not {_PART.size}")
        tag, seq, request, attempt, rows, last, root = _PART.unpack(data)
        if tag != _TAG or seq > MAX_NUMBER or attempt > MAX_ATTEMPTS or not 1 <= rows <= MAX_ROWS or last > 1:
            raise FormatError("delivery part: not one of this version")
        return cls(seq, request, attempt, rows, bool(last), root)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The message of one step, as the stage that sent it signs for it."""

    manifest: Cid
    epoch: int
    stage: int  # the sender; the next one received it
    step: int
    size: int  # parts
    root: bytes  # RFC 9162's over the parts

    def encode(self) -> bytes:
        """The payload that is signed."""
        return canonical.encode(
            {
                "v": 1,
                "manifest": self.manifest,
                "epoch": self.epoch,
                "stage": self.stage,
                "step": self.step,
                "size": self.size,
                "root": self.root,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> Delivery:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_DELIVERY_BYTES), "delivery") as f:
            f.integer("v", 1, 1)
            return cls(
                manifest_link(f),
                f.integer("epoch", 0, MAX_EPOCH),
                f.integer("stage", 0, MAX_STAGES - 1),
                f.integer("step", 0, MAX_NUMBER),
                f.integer("size", 1, MAX_PARTS),
                f.data("root", HASH_BYTES, HASH_BYTES),
            )


@dataclass(frozen=True, slots=True)
class Vouched:
    """A delivery, and who says so: both envelopes, as they came."""

    certificate: Envelope  # of the session that signed
    delivery: Envelope

    def opened(self) -> tuple[Certificate, Delivery]:
        """Both, once the named node is known to vouch for the session and the session to have signed.

        Whether that node is the one to expect, the caller asks. Raises SignatureError, FormatError, ReceiptError.
        """
        terms = certified(self.certificate)
        return terms, self.said(terms)

    def said(self, terms: Certificate) -> Delivery:
        """The delivery, if the session of these terms signed it. Raises SignatureError, FormatError, ReceiptError."""
        said = Delivery.decode(self.delivery.open(DELIVERY_TYPE, frozenset((terms.session,)), "the certified session"))
        if said.epoch != terms.epoch:
            raise ReceiptError(f"delivery: of epoch {said.epoch}, by a session of epoch {terms.epoch}")
        return said

    def fields(self) -> dict[str, Value]:
        """As a part of a map."""
        return {"certificate": self.certificate.to_value(), "delivery": self.delivery.to_value()}

    @classmethod
    def take(cls, f: Fields) -> Vouched:
        """Read `fields` out of a map. Raises FormatError."""
        return cls(
            Envelope.from_value(f.any("certificate"), "certificate", MAX_CERTIFICATE_BYTES),
            Envelope.from_value(f.any("delivery"), "delivery", MAX_DELIVERY_BYTES),
        )


@dataclass(frozen=True, slots=True)
class DeliveryNote:
    """What goes along the edge behind the step message: the signature, and the parts by which it can be checked."""

    vouched: Vouched
    parts: tuple[bytes, ...]  # encoded

    @classmethod
    def of(cls, session: Session, manifest: Cid, stage: int, step: int, parts: Sequence[Part]) -> DeliveryNote:
        """Signed by this session."""
        encoded = tuple(part.encode() for part in parts)
        said = Delivery(manifest, session.epoch, stage, step, len(encoded), _tree(encoded).root())
        return cls(Vouched(session.certificate, session.seal(DELIVERY_TYPE, said.encode())), encoded)

    def path(self, index: int) -> tuple[bytes, ...]:
        """By which part `index` is shown to be in the tree."""
        return _tree(self.parts).inclusion(index)

    def require_whole(self, said: Delivery) -> None:
        """Returns if these are the parts of this delivery. Raises ReceiptError."""
        if said.size != len(self.parts) or said.root != _tree(self.parts).root():
            raise ReceiptError(f"delivery: what was signed for step {said.step} is not over the parts beside it")

    def encode(self) -> bytes:
        """The message."""
        envelopes = canonical.encode(self.vouched.fields())
        return b"".join((_NOTE.pack(_MAGIC, len(self.parts), len(envelopes)), envelopes, *self.parts))

    @classmethod
    def decode(cls, message: bytes) -> DeliveryNote:
        """Read encode's bytes; nothing is verified. Raises FormatError."""
        if len(message) < _NOTE.size:
            raise FormatError("delivery note: cut short")
        magic, count, size = _NOTE.unpack_from(message)
        begin = _NOTE.size + size
        if magic != _MAGIC or count > MAX_PARTS or size > _MAX_ENVELOPES_BYTES:
            raise FormatError("delivery note: not one of this version, or too large")
        if len(message) != begin + count * _PART.size:
            raise FormatError(f"delivery note: {len(message)} bytes for {count} parts")
        with Fields(canonical.decode(message[_NOTE.size : begin], max_bytes=_MAX_ENVELOPES_BYTES), "note") as f:
            vouched = Vouched.take(f)
        parts = tuple(message[at : at + _PART.size] for at in range(begin, len(message), _PART.size))
        return cls(vouched, parts)


def is_delivery_note(message: bytes) -> bool:
    """Whether it is one, or nothing else that goes along an edge."""
    return message.startswith(_START)


def certified(envelope: Envelope) -> Certificate:
    """The certificate, signed by the node that it names. Raises SignatureError, FormatError, ReceiptError."""
    terms = Certificate.decode(envelope.payload)
    envelope.open(CERTIFICATE_TYPE, frozenset((terms.node,)), "the node that it names")
    if terms.role != "stage":
        raise ReceiptError(f"certificate: it is for the role {terms.role}, and a stage's is needed")
    return terms


def require_part(part: Part, index: int, path: Sequence[bytes], said: Delivery) -> None:
    """Returns if this is part `index` of that delivery. Raises ReceiptError."""
    require_included(part.encode(), index, TreeHead(said.size, said.root, 0), path)


def take_path(f: Fields, name: str = "path") -> tuple[bytes, ...]:
    """The hashes of a path, out of a map. Raises FormatError."""
    out = []
    for item in f.items(name, MAX_PROOF):
        if not isinstance(item, bytes) or len(item) != HASH_BYTES:
            raise FormatError(f"{name}: expected hashes of {HASH_BYTES} bytes")
        out.append(item)
    return tuple(out)


def _tree(parts: Sequence[bytes]) -> Log:
    tree = Log()
    for part in parts:
        tree.append(part)
    return tree
