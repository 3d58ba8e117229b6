"""Auditors that do not look: each signs the same of everything it is given, in the form of a true verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from serve_app.audit.auditor import Audited, Auditor
from serve_app.audit.band import DrawJudgement
from serve_app.audit.redraw import Redrawer, Redrawn
from serve_app.audit.verdict import Judgement, Verdict
from serve_app.messages.record import StageRecord
from serve_app.receipts.check import CheckedReceipt
from serve_app.receipts.statement import StageStatement, envelope_cid
from shard_tools.signing import Envelope, PublicKey
from tests.serve_app.audit.redrawn import band, head
from tests.serve_app.audit.rehearsed import AUDITOR, REPLAY, calibrations, model


class LazyAuditor(Auditor):
    """Of layers."""

    def __init__(self, says: Literal["pass", "fault"]) -> None:
        super().__init__(*model(), REPLAY, calibrations(), AUDITOR)
        self._says = says

    def audit(
        self, statement: Envelope, record: StageRecord, holder: PublicKey, now_ms: int, *, exactly: bool = False
    ) -> Audited:
        said = StageStatement.decode(statement.payload)
        judgement = Judgement(self._says, 1.0, 0.5, 0, 1, 1e-7, 1e-6)
        verdict = Verdict.of(
            judgement,
            statement=envelope_cid(statement),
            request_hash=said.request_hash,
            stage=said.stage,
            node=said.node,
            rows=said.n_rows,
            calibration=calibrations()[said.stage].cid,
            auditor=self.key,
            epoch=said.epoch,
            at_ms=now_ms,
        )
        return Audited(verdict, verdict.seal(self._signer), judgement)


class LazyRedrawer(Redrawer):
    """Of draws."""

    def __init__(self, says: Literal["pass", "sampler"]) -> None:
        super().__init__(model()[1], head, (band(),), AUDITOR)
        self._says = says

    def audit(self, checked: CheckedReceipt, record: StageRecord, now_ms: int) -> Redrawn:
        found = DrawJudgement(self._says, 0.5, 0, 0, 0.0, 1.0, None)
        verdict = replace(self._unsigned(checked, band(), found, now_ms), finding=self._says)
        return Redrawn(verdict, verdict.seal(self._signer), found)
