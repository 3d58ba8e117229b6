"""What the Head says came of one request, signed by its session: the tokens, and whose statements back them.

The Head is trusted for nothing here: whatever it could bend is bound by the client's own nonce and ids, or by
the stages' statements. Law: `Receipt.decode(r.encode()) == r`. Bytes: PROTOCOL.md.
One whose request asked for more than signatures is of version 2 and says what; all others are of version 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from serve_app.messages.request import MAX_TOKENS, MAX_VOCAB, NONCE_BYTES, Assurance, Sampling, assurance_of
from serve_app.receipts.commitment import Freshness
from serve_app.receipts.identity import MAX_EPOCH, MAX_TIME
from serve_app.receipts.statement import HASH_BYTES, MAX_ATTEMPTS, MAX_STAGES, manifest_link
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import KEY_BYTES, PublicKey

RECEIPT_TYPE = "application/vnd.llmd.receipt.v1+dag-cbor"
LEVEL_RECEIPT_TYPE = "application/vnd.llmd.receipt.v2+dag-cbor"

ReceiptFinish = Literal["stop", "length", "cancelled"]  # an answer that failed has no receipt

MAX_RECEIPT_BYTES = 6 << 20  # 2**20 token ids of at most 5 bytes, and the rest
MAX_STOP_IDS = 64
_FINISHES = ("stop", "length", "cancelled")
_FRESHNESS = ("client-nonce", "seed", "none")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One answered request."""

    request_hash: bytes
    attempt: int
    manifest: Cid
    sampling: Sampling
    max_tokens: int
    stop_ids: tuple[int, ...]
    n_prompt: int
    out_ids: tuple[int, ...]
    out_root: bytes  # ids_root(manifest, out_ids, n_prompt): stands for out_ids where those are left out
    finish_reason: ReceiptFinish
    freshness: Freshness
    node_nonce: bytes  # the Head's part of the noise key
    statements: tuple[Cid, ...]  # of the signed statements, in the order of stages
    node: PublicKey  # the Head's
    epoch: int
    issued_ms: int  # since 1970
    assurance: Assurance = "signed"

    @property
    def payload_type(self) -> str:
        """What it is signed as."""
        return RECEIPT_TYPE if self.assurance == "signed" else LEVEL_RECEIPT_TYPE

    def encode(self) -> bytes:
        """The payload that is signed."""
        said: dict[str, canonical.Value] = {
            "v": 1,
            "request": self.request_hash,
            "attempt": self.attempt,
            "manifest": self.manifest,
            "sampling": self.sampling.to_value(),
            "max": self.max_tokens,
            "stop": list(self.stop_ids),
            "n_prompt": self.n_prompt,
            "out_ids": list(self.out_ids),
            "out_root": self.out_root,
            "finish": self.finish_reason,
            "freshness": self.freshness,
            "node_nonce": self.node_nonce,
            "statements": list(self.statements),
            "node": self.node,
            "epoch": self.epoch,
            "issued_ms": self.issued_ms,
        }
        if self.assurance != "signed":
            said |= {"v": 2, "assurance": self.assurance}
        return canonical.encode(said)

    @classmethod
    def decode(cls, payload: bytes) -> Receipt:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_RECEIPT_BYTES), "receipt") as f:
            assurance: Assurance = "signed"
            if f.integer("v", 1, 2) == 2:
                assurance = assurance_of(f.text("assurance", 20))
                if assurance == "signed":
                    raise FormatError("receipt.assurance: 'signed' is what a receipt of version 1 says")
            return cls(
                request_hash=f.data("request", HASH_BYTES, HASH_BYTES),
                attempt=f.integer("attempt", 0, MAX_ATTEMPTS),
                manifest=manifest_link(f),
                sampling=Sampling.from_value(f.any("sampling")),
                max_tokens=f.integer("max", 1, MAX_TOKENS),
                stop_ids=f.integers("stop", MAX_STOP_IDS, 0, MAX_VOCAB),
                n_prompt=f.integer("n_prompt", 1, MAX_TOKENS),
                out_ids=f.integers("out_ids", MAX_TOKENS, 0, MAX_VOCAB),
                out_root=f.data("out_root", HASH_BYTES, HASH_BYTES),
                finish_reason=cast(ReceiptFinish, _one_of(f, "finish", _FINISHES)),
                freshness=cast(Freshness, _one_of(f, "freshness", _FRESHNESS)),
                node_nonce=f.data("node_nonce", NONCE_BYTES, NONCE_BYTES),
                statements=tuple(_link(item) for item in f.items("statements", MAX_STAGES)),
                node=PublicKey(f.data("node", KEY_BYTES, KEY_BYTES)),
                epoch=f.integer("epoch", 0, MAX_EPOCH),
                issued_ms=f.integer("issued_ms", 0, MAX_TIME),
                assurance=assurance,
            )


def _one_of(f: Fields, name: str, known: tuple[str, ...]) -> str:
    text = f.text(name, 20)
    if text not in known:
        raise FormatError(f"receipt.{name}: {text!r} is none of {', '.join(known)}")
    return text


def _link(item: canonical.Value) -> Cid:
    if not isinstance(item, Cid):
        raise FormatError(f"receipt.statements: expected a link, found {type(item).__name__}")
    return item
