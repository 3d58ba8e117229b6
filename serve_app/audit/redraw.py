"""The tokens of an answer drawn again, from the rows that its last stage signed for.

Rows n_prompt - 1 and after, through the final norm and the output layer, give the logits; the receipt says the sampling
and its tokens, the opening the prompt and the client's part of the noise's key. What is judged is the draw alone: rows
that are not what the layers give are found by the stage's own audit (auditor.py), and an answer whose tokens come of
another model passes there and fails here.

The last stage signed for these very tokens and for the sampling that they were drawn by (receipts/drawn.py), or the
receipt would not verify: so what is found is its doing. A Head that says other tokens than it was told has signed a
receipt that contradicts the statement it names (receipts/misquote.py), and no audit is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from serve_app.audit.band import DrawBand, DrawJudgement, judge_draws
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.error import Floats, Rows
from serve_app.audit.margin import margin
from serve_app.audit.replay import opened
from serve_app.audit.tail import MICRO, PICO, scaled
from serve_app.engine.penalties import Penalties
from serve_app.engine.sampler import Draw
from serve_app.errors import AuditError, PipelineError
from serve_app.messages.controls import Controls
from serve_app.messages.record import StageRecord
from serve_app.receipts.bundle import Opening
from serve_app.receipts.check import CheckedReceipt
from serve_app.receipts.commitment import noise_key
from serve_app.receipts.receipt import Receipt
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope, Signer


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


def margins_of(receipt: Receipt, opening: Opening, rows: Rows, head: Head, first: int = 0) -> Floats:
    """[out - first]: the margin of each token of the answer from that index on. rows: all that the last stage sent.

    Infinite where nothing could be drawn: a token of no vocabulary, logits that are no numbers (every honest sampler
    refuses those). Raises AuditError if there are other rows than tokens, or what was asked is none of this vocabulary.
    """
    n_prompt, out, s = receipt.n_prompt, receipt.out_ids, receipt.sampling
    if len(rows) != n_prompt + len(out) - 1 or len(opening.prompt_ids) != n_prompt or not out:
        raise AuditError(f"{len(rows)} rows, where {n_prompt} ids and {len(out)} drawn have one less")
    if max(*opening.prompt_ids, *out[:first], *(id for id, _ in s.logit_bias), 0) >= head.vocab_size:
        raise AuditError(f"a token id of the request is none of a vocabulary of {head.vocab_size}")
    key = noise_key(s, opening.client_nonce, receipt.node_nonce)
    draw = Draw(s.temperature_micro, s.top_k, s.top_p_micro, key, s.min_p_micro)
    controls = list(Controls.of([(0, s, (*opening.prompt_ids, *out[:first]), n_prompt)]))
    penalties = Penalties(controls[0], head.vocab_size) if s.penalises or s.logit_bias else None
    # A repetition penalty makes more of a difference between logits, at most so many times as much.
    steep = max(s.repetition_micro / MICRO, MICRO / s.repetition_micro)
    margins = []
    drawn_from = rows[n_prompt - 1 + first :]
    for position, (logits, token) in enumerate(
        zip(head.logits(drawn_from), out[first:], strict=True), n_prompt + first
    ):
        known, drawable = token < head.vocab_size, bool(np.isfinite(logits).all())
        if drawable and penalties is not None:
            try:
                logits = penalties.applied(logits)
            except PipelineError:
                drawable = False
        if known and penalties is not None:
            penalties.add(token)  # what was said, whoever drew it: each token is judged by what came before it
        margins.append(margin(draw, logits, position, token) / steep if known and drawable else np.inf)
    return np.array(margins)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """One verdict, the envelope that says it, and the numbers it rests on where draws were judged."""

    verdict: DrawVerdict
    envelope: Envelope
    judgement: DrawJudgement | None


@dataclass(frozen=True, slots=True)
class ExactHead:
    """What gives the logits of last stages of one profile to the bit."""

    stage: str  # profile of those stages
    profile: str  # of the head, if it is what it should be
    load: Callable[[], Head]


class Redrawer:
    """Draws the answers of one model again."""

    def __init__(
        self,
        manifest: Manifest,
        head: Callable[[], Head],
        bands: Iterable[DrawBand],
        signer: Signer,
        exact: ExactHead | None = None,
    ) -> None:
        """head: the one of this manifest, asked for where it is needed; a band of another profile is of no use to it.

        It may be loaded anew each time, so that its memory is free between answers: a stage that is replayed is, too.
        exact: the same for last stages whose bits can be repeated; what they draw needs no band.
        """
        self._manifest, self._head, self._signer, self._exact = manifest, head, signer, exact
        self._bands = tuple(band for band in bands if band.manifest == manifest.cid)

    def margins(self, checked: CheckedReceipt, record: StageRecord) -> Floats:
        """[tokens]: the margin of each that it drew in the attempt it signed for. record: of the last stage.

        Raises ForgedRecordError for rows that it did not sign for, AuditError for an answer that cannot be drawn again;
        as loading a head does.
        """
        rows, first = self._rows(checked, record), _first(checked)
        return margins_of(checked.receipt, checked.opening, rows, self._head(), first)

    def audit(self, checked: CheckedReceipt, record: StageRecord, now_ms: int) -> Redrawn:
        """The verdict about the tokens of this answer: "uncalibrated" where no band is of both profiles.

        Of one that was begun anew, about those that were drawn since: earlier ones came of rows of other batches, which
        differ from these by more than a head does, and maybe of another stage. Raises as `margins` does, and AuditError
        where bits were promised and cannot be repeated.
        """
        said, rows, first = checked.statements[-1], self._rows(checked, record), _first(checked)
        if self._exact is not None and self._exact.stage == said.profile:
            exact = self._exact.load()
            if exact.profile == self._exact.profile:
                return self._exactly(checked, margins_of(checked.receipt, checked.opening, rows, exact, first), now_ms)
        if checked.receipt.assurance == "exact":
            raise AuditError(f"bits were promised, and logits of {said.profile!r} are not known here to the bit")
        known = [band for band in self._bands if band.prover == said.profile]
        head = self._head() if known else None
        band = next((band for band in known if head and band.auditor == head.profile), None)
        if band is None or head is None:
            return self._verdict(checked, None, None, now_ms)
        found = judge_draws(margins_of(checked.receipt, checked.opening, rows, head, first), band)
        return self._verdict(checked, band, found, now_ms)

    def _rows(self, checked: CheckedReceipt, record: StageRecord) -> Rows:
        receipt, last = checked.receipt, checked.statements[-1]
        first = _first(checked)
        if first >= len(receipt.out_ids) > 0 or (first and receipt.assurance == "exact"):
            raise AuditError(
                f"it was begun anew (attempt {receipt.attempt}) behind {first} of its {len(receipt.out_ids)} tokens: "
                f"nobody signed for all rows that they are drawn of"
            )
        if last.stop != self._manifest.n_layers:  # as check_against_manifest has it; not every client asks for that
            raise AuditError(
                f"the stages end at layer {last.stop} of {self._manifest.n_layers}: nothing is drawn there"
            )
        _, sent = opened(last, record, self._manifest)
        return sent

    def _exactly(self, checked: CheckedReceipt, margins: Floats, now_ms: int) -> Redrawn:
        """By equality: `worst` is the first token that is not the one that is drawn."""
        other = np.flatnonzero(margins)
        finding: Literal["equal", "unequal"] = "unequal" if len(other) else "equal"
        worst = int(other[0]) if len(other) else 0
        blank = self._unsigned(checked, None, None, now_ms)
        verdict = replace(
            blank,
            finding=finding,
            differing=len(other),
            worst=blank.first + worst,
            margin_pico=scaled(float(margins[worst]), PICO),
        )
        return Redrawn(verdict, verdict.seal(self._signer), None)

    def _verdict(
        self, checked: CheckedReceipt, band: DrawBand | None, found: DrawJudgement | None, now_ms: int
    ) -> Redrawn:
        verdict = self._unsigned(checked, band, found, now_ms)
        return Redrawn(verdict, verdict.seal(self._signer), found)

    def _unsigned(
        self, checked: CheckedReceipt, band: DrawBand | None, found: DrawJudgement | None, now_ms: int
    ) -> DrawVerdict:
        receipt, first = checked.receipt, _first(checked)
        return DrawVerdict(
            checked.cid,
            receipt.statements[-1],
            receipt.request_hash,
            checked.statements[-1].node,
            "uncalibrated" if found is None else found.finding,
            0 if found is None else scaled(found.evidence, MICRO),
            first,
            len(receipt.out_ids) - first,
            0 if found is None else found.differing,
            first + (0 if found is None else found.worst),
            0 if found is None else scaled(found.margin, PICO),
            0 if found is None else scaled(found.limit, PICO),
            None if band is None else band.cid,
            self._signer.public,
            receipt.epoch,
            now_ms,
        )


def _first(checked: CheckedReceipt) -> int:
    """Index of the first token that the last stage drew in the attempt it signed for."""
    drawn = checked.statements[-1].drawn
    return 0 if drawn is None else drawn.first - checked.receipt.n_prompt
