"""What is known of one answer: its receipt, whether it was drawn for an audit, and what was found of stage and tokens.

Two looks are taken at an answer that was drawn: at the stage that the draw names, computed again (auditor.py), and at
its tokens, drawn again from the last stage's rows (redraw.py). Law: `Case.decode(c.encode(), auditor) == c`, once
nothing of it is awaited any more and its receipt, which opens the prompt, was left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.audit.desk import Note
from serve_app.audit.draw_verdict import DRAW_VERDICT_TYPE, DrawVerdict
from serve_app.audit.verdict import MAX_VERDICT_BYTES, Verdict
from serve_app.receipts.statement import HASH_BYTES, MAX_STAGES
from shard_tools.canonical import Fields, Value, decode, encode
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope, PublicKey, key_text

MAX_CASE_BYTES = 16 << 10
_MAX_WHY = 1000  # characters; of an error, which may name a path
_MAX_ID = 200  # characters, as of why


@dataclass(frozen=True, slots=True)
class Look:
    """How one of the two went. state: "not drawn", "waiting", "unaudited" with the reason why, or a finding."""

    state: str = "not drawn"
    why: str = ""
    verdict: Envelope | None = None  # signed


WAITING = Look("waiting")


@dataclass(slots=True)
class Case:
    """One answer."""

    id: str
    cid: Cid  # of the receipt's bundle
    receipt: bytes  # the bundle; empty: it is not here any more
    certain: bool  # the client was promised an audit
    commitment: bytes  # to the secret that decided about it
    root: bytes  # of the log when the receipt was in it
    desk: str = field(default="", compare=False)  # who noted it; of no interest later
    stage: int | None = None  # that is computed again
    layers: Look = Look()
    draws: Look = Look()
    exact: bool = False  # and that the stage is held to its bits
    awaited: set[int] = field(default_factory=set)  # stages whose rows are still to be looked at

    @classmethod
    def of(cls, note: Note, root: bytes, desk: str) -> Case:
        """Of an answer that was noted just now."""
        return cls(note.id, note.cid, note.receipt, note.certain, note.commitment, root, desk, exact=note.exact)

    @property
    def client_id(self) -> str:
        """The id under which the client knows it: an ingress that turns to another Head adds to that."""
        return client_id(self.id)

    def give_up(self, why: str, *, layers: bool, draws: bool) -> None:
        """No verdict will come of these, where none is there yet."""
        if layers and self.layers == WAITING:
            self.layers = Look("unaudited", why)
        if draws and self.draws == WAITING:
            self.draws = Look("unaudited", why)

    def encode(self) -> bytes:
        """As it is kept on disk: without the prompt."""
        assert not self.awaited, "what is not over is not kept"
        return encode(
            {
                "v": 1,
                "id": self.id,
                "receipt": self.cid,
                "certain": self.certain,
                "exact": self.exact,
                "commitment": self.commitment,
                "root": self.root,
                "stage": self.stage,
                "layers": _look_value(self.layers),
                "draws": _look_value(self.draws),
            }
        )

    @classmethod
    def decode(cls, data: bytes, auditor: PublicKey) -> Case:
        """Read it. Raises FormatError, also where another auditor's key signed its verdicts."""
        with Fields(decode(data, max_bytes=MAX_CASE_BYTES), "case") as f:
            f.integer("v", 1, 1)
            return cls(
                f.text("id", _MAX_ID),
                f.link("receipt"),
                b"",
                f.boolean("certain"),
                f.data("commitment", 0, HASH_BYTES),
                f.data("root", HASH_BYTES, HASH_BYTES),
                "",
                f.optional_integer("stage", 0, MAX_STAGES - 1),
                _look(f.any("layers"), auditor),
                _look(f.any("draws"), auditor),
                f.boolean("exact"),
            )


def _look_value(look: Look) -> Value:
    verdict = None if look.verdict is None else look.verdict.to_value()
    return {"state": look.state, "why": look.why[:_MAX_WHY], "verdict": verdict}


def _look(value: Value, auditor: PublicKey) -> Look:
    with Fields(value, "case.look") as f:
        state, why, said = f.text("state", 20), f.text("why", _MAX_WHY), f.any("verdict")
    if said is None:
        return Look(state, why)
    sealed = Envelope.from_value(said, "case.look.verdict", MAX_VERDICT_BYTES)
    if sealed.key != auditor:
        raise FormatError(f"case.look.verdict: it is by {key_text(sealed.key)}, who is not the auditor here")
    verdict_value(sealed)  # it can be shown
    return Look(state, why, sealed)


def client_id(id: str) -> str:
    """As Case.client_id."""
    return id.partition("~")[0]


def verdict_value(sealed: Envelope | None) -> Value:
    """A verdict of either kind, of our own signing, as people read it."""
    if sealed is None:
        return None
    signed = encode(sealed.to_value())
    if sealed.payload_type == DRAW_VERDICT_TYPE:
        d = DrawVerdict.decode(sealed.payload)
        return {
            "finding": d.finding,
            "first": d.first,
            "tokens": d.tokens,
            "differing": d.differing,
            "worst": d.worst,
            "margin_pico": d.margin_pico,
            "limit_pico": d.limit_pico,
            "evidence_micro": d.evidence_micro,
            "node": key_text(d.node),
            "band": None if d.band is None else str(d.band),
            "at_ms": d.at_ms,
            "signed": signed,
        }
    v = Verdict.decode(sealed.payload)
    return {
        "finding": v.finding,
        "stage": v.stage,
        "node": key_text(v.node),
        "p_pico": v.p_pico,
        "window": [v.first, v.tokens],
        "error_pico": v.error_pico,
        "limit_pico": v.limit_pico,
        "rows": v.rows,
        "calibration": None if v.calibration is None else str(v.calibration),
        "at_ms": v.at_ms,
        "signed": signed,
    }
