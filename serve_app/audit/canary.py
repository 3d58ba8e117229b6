"""Audits whose outcome their maker knew: an auditor that signs without looking, or accuses at will, fails one.

A canary is an answer like any other: a receipt that verifies, statements of a session that its maker holds, rows that
open them; the maker let a stage compute or draw something else, or nothing. An auditor is given what it always is. What
must be found is in a salted leaf; the hash of a batch of leaves goes into the auditor's own log before the canaries do,
where commitments to draws go too. So a miss is proved by what the auditor signed (its verdict, and its log, in which
the commitment comes first) and by what the maker opens. That the outcome is the true one is the maker's word until
somebody computes the rows again, whose hash is in the leaf: whoever is accused can ask for them and do so.
Laws: `Miss.decode(m.encode()) == m`. Bytes: PROTOCOL.md. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.audit.draw_verdict import DRAW_VERDICT_TYPE, DrawVerdict
from serve_app.audit.verdict import MAX_VERDICT_BYTES, Verdict
from serve_app.errors import AuditError
from serve_app.receipts.log import MAX_ENTRIES, MAX_HEAD_BYTES, MAX_PROOF, TreeHead, require_included
from serve_app.receipts.statement import HASH_BYTES, envelope_cid
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope, PublicKey, Signer

Outcome = Literal["honest", "fault"]
Answer = Literal["met", "missed", "unanswered"]

MISS_TYPE = "application/vnd.llmd.canary-miss.v1+dag-cbor"
MAX_BATCH = 256  # canaries under one commitment
MAX_MISS_BYTES = 32 << 10
SALT_BYTES = 32
_LEAF_TAG, _BATCH_TAG = b"llmd.canary.v1\0", b"llmd.canaries.v1\0"
# What contradicts the outcome. Anything else ("suspect", "uncalibrated") neither meets nor misses it.
_WRONG: dict[Outcome, frozenset[str]] = {
    "honest": frozenset(("fault", "unequal", "forged", "sampler")),
    "fault": frozenset(("pass", "equal")),
}


@dataclass(frozen=True, slots=True)
class Canary:
    """One verdict that is known beforehand."""

    statement: Cid  # the envelope that it will be about
    draws: bool  # about the tokens; else about the stage's layers
    outcome: Outcome
    shown: bytes  # SHA-256 of the rows' record: who doubts the outcome has them shown and computes them again
    salt: bytes  # without it the few outcomes could be tried

    @property
    def leaf(self) -> bytes:
        """32 bytes that tell nothing before this is opened."""
        return hashlib.sha256(_LEAF_TAG + canonical.encode(self.to_value())).digest()

    def answered(self, finding: str) -> Answer:
        """What a verdict with this finding is worth."""
        other: Outcome = "fault" if self.outcome == "honest" else "honest"
        return "missed" if finding in _WRONG[self.outcome] else "met" if finding in _WRONG[other] else "unanswered"

    def to_value(self) -> Value:
        return {
            "statement": self.statement,
            "draws": self.draws,
            "outcome": self.outcome,
            "shown": self.shown,
            "salt": self.salt,
        }

    @classmethod
    def from_value(cls, value: Value) -> Canary:
        """Raises FormatError."""
        with Fields(value, "canary") as f:
            outcome = f.text("outcome", 10)
            if outcome not in _WRONG:
                raise FormatError(f"canary.outcome: {outcome!r} is none of {', '.join(_WRONG)}")
            known: Outcome = "honest" if outcome == "honest" else "fault"
            shown, salt = f.data("shown", HASH_BYTES, HASH_BYTES), f.data("salt", SALT_BYTES, SALT_BYTES)
            return cls(f.link("statement"), f.boolean("draws"), known, shown, salt)


def batch_commitment(leaves: Sequence[bytes]) -> bytes:
    """32 bytes to be logged before any of these canaries is handed out."""
    assert 0 < len(leaves) <= MAX_BATCH and all(len(leaf) == HASH_BYTES for leaf in leaves)
    return hashlib.sha256(_BATCH_TAG + b"".join(leaves)).digest()


@dataclass(frozen=True, slots=True)
class Logged:
    """Where an entry stands in the auditor's log, and the proof."""

    index: int
    path: tuple[bytes, ...]

    @classmethod
    def from_value(cls, value: Value) -> Logged:
        """As AuditOffice.prove gives it. Raises FormatError."""
        with Fields(value, "logged") as f:
            return cls(f.integer("index", 0, MAX_ENTRIES), _hashes(f, "path", MAX_PROOF))

    def to_value(self) -> Value:
        return {"index": self.index, "path": list(self.path)}


@dataclass(frozen=True, slots=True)
class Miss:
    """An auditor's verdict that contradicts what was committed to before it."""

    leaves: tuple[bytes, ...]  # of the batch
    canary: Canary
    verdict: Envelope
    head: Envelope  # of the auditor's log
    committed: Logged
    judged: Logged

    def convicted(self) -> PublicKey:
        """The auditor, of what its own signatures and the maker's opening say.

        Raises AuditError where they do not say so; SignatureError, FormatError, ReceiptError.
        """
        auditor, statement, finding, draws = _said(self.verdict)
        if (statement, draws) != (self.canary.statement, self.canary.draws):
            raise AuditError("the verdict is about something else than the canary")
        if self.canary.answered(finding) != "missed":
            raise AuditError(f"{finding!r} does not contradict an outcome of {self.canary.outcome!r}")
        if self.canary.leaf not in self.leaves:
            raise AuditError("the canary is none of those that were committed to")
        head = TreeHead.open(self.head, auditor)
        committed, judged = Cid.of(Codec.RAW, batch_commitment(self.leaves)), envelope_cid(self.verdict)
        require_included(bytes(committed), self.committed.index, head, self.committed.path)
        require_included(bytes(judged), self.judged.index, head, self.judged.path)
        if self.committed.index >= self.judged.index:
            raise AuditError("the verdict was there before the commitment: the outcome may have been made to fit")
        return auditor

    def encode(self) -> bytes:
        """The payload that its maker signs."""
        return canonical.encode(
            {
                "v": 1,
                "leaves": list(self.leaves),
                "canary": self.canary.to_value(),
                "verdict": self.verdict.to_value(),
                "head": self.head.to_value(),
                "committed": self.committed.to_value(),
                "judged": self.judged.to_value(),
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> Miss:
        """Read a payload; `convicted` asks whether it is a miss. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_MISS_BYTES), "miss") as f:
            f.integer("v", 1, 1)
            return cls(
                _hashes(f, "leaves", MAX_BATCH),
                Canary.from_value(f.any("canary")),
                Envelope.from_value(f.any("verdict"), "miss.verdict", MAX_VERDICT_BYTES),
                Envelope.from_value(f.any("head"), "miss.head", MAX_HEAD_BYTES),
                Logged.from_value(f.any("committed")),
                Logged.from_value(f.any("judged")),
            )

    def seal(self, maker: Signer) -> Envelope:
        """As its maker answers for the outcome."""
        return Envelope.seal(maker, MISS_TYPE, self.encode())

    @classmethod
    def open(cls, envelope: Envelope, makers: frozenset[PublicKey]) -> Miss:
        """By one of these makers. Raises SignatureError, FormatError."""
        return cls.decode(envelope.open(MISS_TYPE, makers, "a maker of canaries"))


def verdict_about(sealed: Envelope) -> tuple[Cid, bool]:
    """The statement that a verdict of either kind is about, and whether it is about draws. Raises FormatError."""
    if sealed.payload_type == DRAW_VERDICT_TYPE:
        return DrawVerdict.decode(sealed.payload).statement, True
    return Verdict.decode(sealed.payload).statement, False


def _hashes(f: Fields, name: str, most: int) -> tuple[bytes, ...]:
    items = f.items(name, most)
    hashes = tuple(item for item in items if isinstance(item, bytes) and len(item) == HASH_BYTES)
    if len(hashes) != len(items):
        raise FormatError(f"{name}: expected hashes of {HASH_BYTES} bytes")
    return hashes


def _said(sealed: Envelope) -> tuple[PublicKey, Cid, str, bool]:
    """auditor, statement, finding, whether of draws. Raises SignatureError, FormatError."""
    keys = frozenset((sealed.key,))
    if sealed.payload_type == DRAW_VERDICT_TYPE:
        drawn = DrawVerdict.open(sealed, keys)
        return drawn.auditor, drawn.statement, drawn.finding, True
    verdict = Verdict.open(sealed, keys)
    return verdict.auditor, verdict.statement, verdict.finding, False
