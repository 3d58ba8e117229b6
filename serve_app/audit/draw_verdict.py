"""What an auditor says of the draws of one answer. How it comes to it: redraw.py, band.py. Bytes: PROTOCOL.md.

It is about one node, the last stage's, which signed for having drawn these tokens from these rows by this sampling.

Needs no torch: whoever reads verdicts imports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from serve_app.audit.band import DrawFinding
from serve_app.audit.tail import MAX_PICO, MICRO, PICO
from serve_app.receipts.identity import MAX_EPOCH, MAX_TIME
from serve_app.receipts.statement import HASH_BYTES, MAX_ROWS
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey, Signer, key_text

DRAW_VERDICT_TYPE = "application/vnd.llmd.draw-verdict.v2+dag-cbor"
MAX_DRAW_VERDICT_BYTES = 1 << 10
_FINDINGS = ("pass", "suspect", "sampler", "uncalibrated", "equal", "unequal")
_WITHOUT_BAND = ("uncalibrated", "equal", "unequal")


@dataclass(frozen=True, slots=True)
class DrawVerdict:
    """One auditor's finding about the draws of one answer. Law: `DrawVerdict.open(v.seal(s), keys) == v`."""

    receipt: Cid  # of the bundle
    statement: Cid  # the last stage's
    request_hash: bytes
    node: PublicKey  # the last stage's
    finding: DrawFinding | Literal["uncalibrated", "equal", "unequal"]
    evidence_micro: int
    first: int  # index in the answer of the first token judged: those before were drawn in an attempt given up
    tokens: int  # so many from there on
    differing: int
    worst: int  # index in the answer of the token with the largest margin
    margin_pico: int
    limit_pico: int
    band: Cid | None  # None: nothing was judged, or each token is the very one that is drawn ("equal"), or not
    auditor: PublicKey  # its node
    epoch: int
    at_ms: int

    @property
    def accuses(self) -> bool:
        """Whether tokens are not what rows and sampling give."""
        return self.finding in ("sampler", "unequal")

    @property
    def summary(self) -> str:
        """What was seen, and who drew it, in words."""
        margin, limit, evidence = self.margin_pico / PICO, self.limit_pico / PICO, self.evidence_micro / MICRO
        return (
            f"{self.finding}: token {self.worst + 1} of {self.first + self.tokens} is {margin:.3g} logits from being "
            f"drawn, where {limit:.3g} decide, and the evidence of all is {evidence:.3g}. "
            f"Drawn by {key_text(self.node)}"
        )

    def encode(self) -> bytes:
        """The payload that is signed."""
        return canonical.encode(
            {
                "v": 2,
                "receipt": self.receipt,
                "statement": self.statement,
                "request": self.request_hash,
                "node": self.node,
                "finding": self.finding,
                "evidence_micro": self.evidence_micro,
                "first": self.first,
                "tokens": self.tokens,
                "differing": self.differing,
                "worst": self.worst,
                "margin_pico": self.margin_pico,
                "limit_pico": self.limit_pico,
                "band": self.band,
                "auditor": self.auditor,
                "epoch": self.epoch,
                "at_ms": self.at_ms,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> DrawVerdict:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_DRAW_VERDICT_BYTES), "draw verdict") as f:
            f.integer("v", 2, 2)
            finding, band = f.text("finding", 20), f.any("band")
            if finding not in _FINDINGS:
                raise FormatError(f"draw verdict.finding: {finding!r} is none of {', '.join(_FINDINGS)}")
            if not (band is None or isinstance(band, Cid)) or (band is None) != (finding in _WITHOUT_BAND):
                raise FormatError(f"draw verdict.band: {str(band)[:100]!r} does not go with a finding of {finding!r}")
            return cls(
                f.link("receipt"),
                f.link("statement"),
                f.data("request", HASH_BYTES, HASH_BYTES),
                _key(f, "node"),
                cast(DrawFinding, finding),  # or one without a band
                f.integer("evidence_micro", 0, MAX_PICO),
                f.integer("first", 0, MAX_ROWS),
                f.integer("tokens", 1, MAX_ROWS),
                f.integer("differing", 0, MAX_ROWS),
                f.integer("worst", 0, MAX_ROWS),
                f.integer("margin_pico", 0, MAX_PICO),
                f.integer("limit_pico", 0, MAX_PICO),
                band,
                _key(f, "auditor"),
                f.integer("epoch", 0, MAX_EPOCH),
                f.integer("at_ms", 0, MAX_TIME),
            )

    def seal(self, auditor: Signer) -> Envelope:
        """The verdict as the auditor's node signs it. `auditor` must be the node's own key."""
        assert auditor.public == self.auditor
        return Envelope.seal(auditor, DRAW_VERDICT_TYPE, self.encode())

    @classmethod
    def open(cls, envelope: Envelope, auditors: frozenset[PublicKey]) -> DrawVerdict:
        """The verdict, once one of these auditors is known to have signed it in its own name.

        Raises SignatureError, FormatError.
        """
        verdict = cls.decode(envelope.open(DRAW_VERDICT_TYPE, auditors, "an auditor"))
        if verdict.auditor != envelope.key:
            raise FormatError("draw verdict.auditor: it is signed by another key than it speaks for")
        return verdict


def _key(f: Fields, name: str) -> PublicKey:
    return PublicKey(f.data(name, KEY_BYTES, KEY_BYTES))
