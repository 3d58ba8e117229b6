"""What one stage says it did for one request, signed by its session.

Covers: these layers of this model, loaded from these shards, took rows with this root and gave rows with that
one, and of the last stage what it drew from them (drawn.py). Says nothing of whether the rows and draws are right; that
is what an auditor's replay is for. A session's statements
form a chain (seq, prev), so that taking one back, or telling two stories, shows.
Law: `StageStatement.decode(s.encode()) == s`. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from serve_app.receipts.drawn import Drawn
from serve_app.receipts.identity import MAX_EPOCH, MAX_TIME, Session
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey

STATEMENT_TYPE = "application/vnd.llmd.statement.v2+dag-cbor"

HASH_BYTES = 32
NO_PREVIOUS = bytes(HASH_BYTES)  # `prev` of a session's first statement
MAX_STAGES = 64
MAX_LAYERS = 1 << 12
MAX_ROWS = 1 << 21  # prompt and completion, 2**20 each
MAX_ATTEMPTS = 1 << 16
MAX_STATEMENT_BYTES = 64 << 10  # 1024 shards of 41 bytes each, with room to spare
_MAX_SHARDS = 1024
_MAX_PROFILE = 200  # characters
_NOBODY = PublicKey(bytes(KEY_BYTES))


@dataclass(frozen=True, slots=True)
class StageStatement:
    """One stage's part in one request. node, epoch, seq and prev are filled in by StatementChain."""

    request_hash: bytes
    attempt: int  # how often the request had begun anew: its rows were gone
    stage: int
    n_stages: int
    start: int  # decoder layers [start, stop)
    stop: int
    manifest: Cid
    shards: tuple[Cid, ...]  # the files this stage loaded, in the manifest's order
    profile: str  # how it computed: engine, device, dtype; compared by people and auditors only
    in_root: bytes  # over the rows as received; stage 0: over the token ids
    out_root: bytes  # over the rows as sent; the last stage: those entering the final norm
    n_rows: int
    started_ms: int  # since 1970
    ended_ms: int
    drawn: Drawn | None = None  # of the last stage, and of no other
    node: PublicKey = _NOBODY
    epoch: int = 0
    seq: int = 0
    prev: bytes = NO_PREVIOUS

    def encode(self) -> bytes:
        """The payload that is signed."""
        return canonical.encode(
            {
                "v": 2,
                "request": self.request_hash,
                "attempt": self.attempt,
                "stage": self.stage,
                "n_stages": self.n_stages,
                "start": self.start,
                "stop": self.stop,
                "manifest": self.manifest,
                "shards": list(self.shards),
                "profile": self.profile,
                "in_root": self.in_root,
                "out_root": self.out_root,
                "n_rows": self.n_rows,
                "started_ms": self.started_ms,
                "ended_ms": self.ended_ms,
                "drawn": None if self.drawn is None else self.drawn.to_value(),
                "node": self.node,
                "epoch": self.epoch,
                "seq": self.seq,
                "prev": self.prev,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> StageStatement:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_STATEMENT_BYTES), "statement") as f:
            f.integer("v", 2, 2)
            return cls(
                request_hash=f.data("request", HASH_BYTES, HASH_BYTES),
                attempt=f.integer("attempt", 0, MAX_ATTEMPTS),
                stage=f.integer("stage", 0, MAX_STAGES - 1),
                n_stages=f.integer("n_stages", 1, MAX_STAGES),
                start=f.integer("start", 0, MAX_LAYERS),
                stop=f.integer("stop", 0, MAX_LAYERS),
                manifest=manifest_link(f),
                shards=_links(f),
                profile=f.text("profile", _MAX_PROFILE),
                in_root=f.data("in_root", HASH_BYTES, HASH_BYTES),
                out_root=f.data("out_root", HASH_BYTES, HASH_BYTES),
                n_rows=f.integer("n_rows", 1, MAX_ROWS),
                started_ms=f.integer("started_ms", 0, MAX_TIME),
                ended_ms=f.integer("ended_ms", 0, MAX_TIME),
                drawn=None if (drawn := f.any("drawn")) is None else Drawn.from_value(drawn),
                node=PublicKey(f.data("node", KEY_BYTES, KEY_BYTES)),
                epoch=f.integer("epoch", 0, MAX_EPOCH),
                seq=f.integer("seq", 0, MAX_TIME),
                prev=f.data("prev", HASH_BYTES, HASH_BYTES),
            )

    def sign(self, session: Session) -> Envelope:
        """The statement as this session signs it. StatementChain.sign fills in seq and prev first."""
        return session.seal(STATEMENT_TYPE, self.encode())


class StatementChain:
    """Signs a session's statements, each naming the one before. The only owner of seq and prev."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._seq = 0
        self._prev = NO_PREVIOUS

    def sign(self, statement: StageStatement) -> Envelope:
        """The statement with this session's node, epoch and place in the chain, signed."""
        placed = replace(statement, node=self.session.node, epoch=self.session.epoch, seq=self._seq, prev=self._prev)
        envelope = placed.sign(self.session)
        self._seq += 1
        self._prev = hashlib.sha256(envelope.payload).digest()
        return envelope


def envelope_cid(envelope: Envelope) -> Cid:
    """The name of a signed statement, signature included."""
    return Cid.of(Codec.DAG_CBOR, canonical.encode(envelope.to_value()))


def manifest_link(f: Fields) -> Cid:
    """The field `manifest`. Raises FormatError for the name of a block that can be no manifest."""
    cid = f.link("manifest")
    if cid.codec is not Codec.DAG_CBOR:
        raise FormatError(f"manifest: {cid} names a {cid.codec.name.lower()} block, a manifest is dag_cbor")
    return cid


def _links(f: Fields) -> tuple[Cid, ...]:
    links = []
    for item in f.items("shards", _MAX_SHARDS):
        if not isinstance(item, Cid):
            raise FormatError(f"statement.shards: expected a link, found {type(item).__name__}")
        links.append(item)
    return tuple(links)
