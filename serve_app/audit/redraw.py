"""The tokens of an answer drawn again, from the rows that its last stage signed for.

Rows n_prompt - 1 and after, through the final norm and the output layer, give the logits; the receipt says the sampling
and its tokens, the opening the prompt and the client's part of the noise's key. What is judged is the draw alone: rows
that are not what the layers give are found by the stage's own audit (auditor.py), and an answer whose tokens come of
another model passes there and fails here.

Two nodes could have put another token in the answer: the last stage, which draws, and the Head, which passes that on
and signs the receipt. Stages do not sign their draws, so the verdict names both, and no standing follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from serve_app.audit.band import DrawBand, DrawFinding, DrawJudgement, judge_draws
from serve_app.audit.error import Floats, Rows
from serve_app.audit.margin import margin
from serve_app.audit.replay import opened
from serve_app.audit.tail import MAX_PICO, MICRO, PICO
from serve_app.engine.penalties import Penalties
from serve_app.engine.sampler import Draw
from serve_app.errors import AuditError, PipelineError
from serve_app.messages.controls import Controls
from serve_app.messages.record import StageRecord
from serve_app.receipts.bundle import Opening
from serve_app.receipts.check import CheckedReceipt
from serve_app.receipts.commitment import noise_key
from serve_app.receipts.identity import MAX_EPOCH, MAX_TIME
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.statement import HASH_BYTES, MAX_ROWS
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.manifest import Manifest
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey, Signer

DRAW_VERDICT_TYPE = "application/vnd.llmd.draw-verdict.v1+dag-cbor"
MAX_DRAW_VERDICT_BYTES = 1 << 10
_FINDINGS = ("pass", "suspect", "sampler")


class Head(Protocol):
    """Logits of rows that left the last layer (engine/output_head.py)."""

    @property
    def profile(self) -> str:
        """As bands name it."""

    @property
    def vocab_size(self) -> int:
        """Width of its rows of logits."""

    def logits(self, rows: Rows) -> Iterator[npt.NDArray[np.float32]]:
        """[vocab] of each row in turn."""


def margins_of(receipt: Receipt, opening: Opening, rows: Rows, head: Head) -> Floats:
    """[out]: the margin of each token of the answer. rows: all that the last stage sent, widened.

    Raises AuditError if logits cannot be computed from them, or the ids are none of this vocabulary.
    """
    n_prompt, out = receipt.n_prompt, receipt.out_ids
    if len(rows) != n_prompt + len(out) - 1 or len(opening.prompt_ids) != n_prompt or not out:
        raise AuditError(f"{len(rows)} rows, where {n_prompt} ids and {len(out)} drawn have one less")
    if max(*opening.prompt_ids, *out, *(id for id, _ in receipt.sampling.logit_bias)) >= head.vocab_size:
        raise AuditError(f"a token id of the request is none of a vocabulary of {head.vocab_size}")
    s = receipt.sampling
    key = noise_key(s, opening.client_nonce, receipt.node_nonce)
    draw = Draw(s.temperature_micro, s.top_k, s.top_p_micro, key, s.min_p_micro)
    controls = list(Controls.of([(0, s, opening.prompt_ids, n_prompt)]))
    penalties = Penalties(controls[0], head.vocab_size) if s.penalises or s.logit_bias else None
    margins = []
    for i, (logits, token) in enumerate(zip(head.logits(rows[n_prompt - 1 :]), out, strict=True)):
        if not np.isfinite(logits).all():
            raise AuditError(f"row {n_prompt - 1 + i} gives logits that are no numbers: the stage's audit finds why")
        if penalties is not None:
            try:
                logits = penalties.applied(logits)
            except PipelineError as e:
                raise AuditError(f"token {i} cannot be drawn again: {e}") from e
            penalties.add(token)  # what was said, whoever drew it: each token is judged by what came before it
        margins.append(margin(draw, logits, n_prompt + i, token))
    return np.array(margins)


@dataclass(frozen=True, slots=True)
class DrawVerdict:
    """One auditor's finding about the draws of one answer. Law: `DrawVerdict.open(v.seal(s), keys) == v`."""

    receipt: Cid  # of the bundle
    statement: Cid  # the last stage's
    request_hash: bytes
    nodes: tuple[PublicKey, PublicKey]  # the last stage's, the Head's: one of them, where a sampler is found
    finding: DrawFinding
    evidence_micro: int
    tokens: int
    differing: int
    worst: int  # index of the token with the largest margin
    margin_pico: int
    limit_pico: int
    band: Cid
    auditor: PublicKey  # its node
    epoch: int
    at_ms: int

    def encode(self) -> bytes:
        """The payload that is signed."""
        return canonical.encode(
            {
                "v": 1,
                "receipt": self.receipt,
                "statement": self.statement,
                "request": self.request_hash,
                "stage_node": self.nodes[0],
                "head_node": self.nodes[1],
                "finding": self.finding,
                "evidence_micro": self.evidence_micro,
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
            f.integer("v", 1, 1)
            finding = f.text("finding", 10)
            if finding not in _FINDINGS:
                raise FormatError(f"draw verdict.finding: {finding!r} is none of {', '.join(_FINDINGS)}")
            return cls(
                f.link("receipt"),
                f.link("statement"),
                f.data("request", HASH_BYTES, HASH_BYTES),
                (_key(f, "stage_node"), _key(f, "head_node")),
                cast(DrawFinding, finding),
                f.integer("evidence_micro", 0, MAX_PICO),
                f.integer("tokens", 1, MAX_ROWS),
                f.integer("differing", 0, MAX_ROWS),
                f.integer("worst", 0, MAX_ROWS),
                f.integer("margin_pico", 0, MAX_PICO),
                f.integer("limit_pico", 0, MAX_PICO),
                f.link("band"),
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


@dataclass(frozen=True, slots=True)
class Redrawn:
    """One verdict, the envelope that says it, and the numbers it rests on."""

    verdict: DrawVerdict
    envelope: Envelope
    judgement: DrawJudgement


class Redrawer:
    """Draws the answers of one model again."""

    def __init__(self, manifest: Manifest, head: Head, bands: Iterable[DrawBand], signer: Signer) -> None:
        """head: of this manifest; a band of another profile than its own is of no use to it."""
        self._manifest, self._head, self._signer = manifest, head, signer
        self._bands = {b.prover: b for b in bands if b.auditor == head.profile and b.manifest == manifest.cid}

    def margins(self, checked: CheckedReceipt, record: StageRecord) -> Floats:
        """[out]: the margin of each token. record: of the last stage.

        Raises ForgedRecordError for rows that it did not sign for, AuditError.
        """
        last = checked.statements[-1]
        if last.stop != self._manifest.n_layers:  # as check_against_manifest has it; not every client asks for that
            raise AuditError(
                f"the stages end at layer {last.stop} of {self._manifest.n_layers}: nothing is drawn there"
            )
        _, sent = opened(last, record, self._manifest)
        return margins_of(checked.receipt, checked.opening, sent, self._head)

    def audit(self, checked: CheckedReceipt, record: StageRecord, now_ms: int) -> Redrawn:
        """The verdict about the tokens of this answer. Raises as `margins` does, and AuditError where no band is."""
        receipt, said = checked.receipt, checked.statements[-1]
        band = self._bands.get(said.profile)
        if band is None:
            raise AuditError(f"no draws are calibrated of {said.profile[:100]!r} by {self._head.profile[:100]!r}")
        margins = self.margins(checked, record)
        found = judge_draws(margins, band)
        verdict = DrawVerdict(
            checked.cid,
            receipt.statements[-1],
            receipt.request_hash,
            (said.node, receipt.node),
            found.finding,
            _scaled(found.evidence, MICRO),
            len(margins),
            found.differing,
            found.worst,
            _scaled(found.margin, PICO),
            _scaled(found.limit, PICO),
            band.cid,
            self._signer.public,
            receipt.epoch,
            now_ms,
        )
        return Redrawn(verdict, verdict.seal(self._signer), found)


def _key(f: Fields, name: str) -> PublicKey:
    return PublicKey(f.data(name, KEY_BYTES, KEY_BYTES))


def _scaled(value: float, unit: int) -> int:
    """Rounded up; what is beyond the largest, infinities too, is the largest."""
    scaled = value * unit
    return MAX_PICO if not scaled < MAX_PICO else -int(-scaled // 1)
