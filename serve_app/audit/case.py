"""What is known of one answer: its receipt, whether it was drawn for an audit, and what was found of stage and tokens.

Two looks are taken at an answer that was drawn: at the stage that the draw names, computed again (auditor.py), and at
its tokens, drawn again from the last stage's rows (redraw.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.audit.desk import Note
from serve_app.audit.draw_verdict import DRAW_VERDICT_TYPE, DrawVerdict
from serve_app.audit.verdict import Verdict
from shard_tools.canonical import Value, encode
from shard_tools.signing import Envelope, key_text


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

    note: Note
    root: bytes  # of the log when the receipt was in it
    stage: int | None = None  # that is computed again
    layers: Look = Look()
    draws: Look = Look()
    awaited: set[int] = field(default_factory=set)  # stages whose rows are still to be looked at

    def give_up(self, why: str, *, layers: bool, draws: bool) -> None:
        """No verdict will come of these, where none is there yet."""
        if layers and self.layers == WAITING:
            self.layers = Look("unaudited", why)
        if draws and self.draws == WAITING:
            self.draws = Look("unaudited", why)


def verdict_value(sealed: Envelope | None) -> Value:
    """A verdict of either kind, of our own signing, as people read it."""
    if sealed is None:
        return None
    signed = encode(sealed.to_value())
    if sealed.payload_type == DRAW_VERDICT_TYPE:
        d = DrawVerdict.decode(sealed.payload)
        return {
            "finding": d.finding,
            "tokens": d.tokens,
            "differing": d.differing,
            "worst": d.worst,
            "margin_pico": d.margin_pico,
            "limit_pico": d.limit_pico,
            "evidence_micro": d.evidence_micro,
            "stage_node": key_text(d.nodes[0]),
            "head_node": key_text(d.nodes[1]),
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
