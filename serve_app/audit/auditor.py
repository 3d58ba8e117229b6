"""One auditor at work: a signed statement and the rows behind it in, a signed verdict out.

Holds a store it reads shards from, the calibrations it may judge by, and its node's key. Where it has no calibration of
that kind it says so ("uncalibrated"). What it cannot judge for another reason it refuses with AuditError and says
nothing about: no verdict is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from serve_app.audit.calibration import Calibration
from serve_app.audit.error import Rows
from serve_app.audit.exact import ExactReplay
from serve_app.audit.replay import Layers, Replayed, opened, replay
from serve_app.audit.verdict import LEAST_EVIDENCE, Judgement, Verdict, judge
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.load import LoadOptions
from serve_app.errors import AuditError, ForgedRecordError
from serve_app.messages.record import StageRecord
from serve_app.receipts.statement import StageStatement, envelope_cid
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope, PublicKey, Signer
from shard_tools.store.block_store import BlockStore

# Up to this, errors as they are say too little for a second look. Honest answers of SmolLM2 in bfloat16, of 64 rows,
# have 0.6 to 3.3; those by weights that are off by 0.3 % have 18 to 107.
LITTLE_EVIDENCE = 4.0
KEEP_BYTES = 1 << 30  # of layers that stay loaded between audits: all of a small model


@dataclass(frozen=True, slots=True)
class Audited:
    """One verdict, the envelope that says it, and the numbers it rests on where rows were compared."""

    verdict: Verdict
    envelope: Envelope
    judgement: Judgement | None


class Auditor:
    """Judges stages of one model."""

    def __init__(
        self,
        store: BlockStore,
        manifest: Manifest,
        options: LoadOptions,
        calibrations: Iterable[Calibration],
        signer: Signer,
        exact: ExactReplay | None = None,
    ) -> None:
        """options: how it replays; a calibration of another profile of its own is of no use to it.

        exact: what repeats the bits of stages of its profile: they are held to them, and need no calibration.
        """
        self._manifest, self._layers = manifest, Layers(store, manifest, options, KEEP_BYTES)
        self._calibrations, self._signer, self._exact = tuple(calibrations), signer, exact

    @property
    def key(self) -> PublicKey:
        """Its node's."""
        return self._signer.public

    def audit(
        self, statement: Envelope, record: StageRecord, holder: PublicKey, now_ms: int, *, exactly: bool = False
    ) -> Audited:
        """The verdict about this statement, whose signature the receipt's check has verified.

        holder: the node that showed the record; it answers for bytes that do not open the statement. exactly: bit by
        bit or not at all, as was promised. Raises AuditError, NotFoundError, CorruptBlockError.
        """
        said = StageStatement.decode(statement.payload)
        cid = envelope_cid(statement)
        try:
            dtype, sent = opened(said, record, self._manifest)
        except ForgedRecordError:
            forged = Verdict.without("forged", statement=cid, said=said, node=holder, auditor=self.key, at_ms=now_ms)
            return Audited(forged, forged.seal(self._signer), None)
        if self._exact is not None and (exactly or said.profile == self._exact.profile):
            first = self._exact.first_unequal(said, record)
            bits = Verdict.exact(first, statement=cid, said=said, auditor=self.key, at_ms=now_ms)
            return Audited(bits, bits.seal(self._signer), None)
        if exactly:
            raise AuditError("bits were promised, and this auditor cannot repeat them: pipeline.deterministic is off")
        calibrations = [c for c in self._calibrations if c.prover == said.profile and c.start == said.start]
        replayed = self._replay(said, dtype, [record], nudge=False)[0] if calibrations else None
        calibration = next((c for c in calibrations if replayed and c.auditor == replayed.profile), None)
        if calibration is None or replayed is None:
            unknown = Verdict.without(
                "uncalibrated", statement=cid, said=said, node=said.node, auditor=self.key, at_ms=now_ms
            )
            return Audited(unknown, unknown.seal(self._signer), None)
        calibration.require_for(said, replayed.profile)
        if len(calibration.sizes) != self._manifest.hidden_size:
            raise AuditError(
                f"calibration {calibration.cid}: {len(calibration.sizes)} channels, the model has other rows"
            )
        judgement = judge(calibration.errors(sent, replayed), calibration)
        if judgement.finding == "pass" and judgement.evidence <= LITTLE_EVIDENCE:
            # Its rows pass without asking how much rounding they carry, which could only make their errors less. What
            # the evidence would have been is not known; the least there is keeps it an e-value.
            judgement = replace(judgement, evidence=LEAST_EVIDENCE)
        else:
            (replayed,) = self._replay(said, dtype, [record], nudge=True)
            judgement = judge(calibration.errors(sent, replayed), calibration)
        verdict = Verdict.of(
            judgement,
            statement=cid,
            request_hash=said.request_hash,
            stage=said.stage,
            node=said.node,
            rows=said.n_rows,
            calibration=calibration.cid,
            auditor=self.key,
            epoch=said.epoch,
            at_ms=now_ms,
        )
        return Audited(verdict, verdict.seal(self._signer), judgement)

    def compare(
        self, statements: Sequence[StageStatement], records: Sequence[StageRecord]
    ) -> tuple[list[Rows], list[Replayed]]:
        """What was sent and what should have been, for records of one span: what a calibration is made of.

        Raises ForgedRecordError besides what `audit` raises.
        """
        pairs = [opened(s, r, self._manifest) for s, r in zip(statements, records, strict=True)]
        return [rows for _, rows in pairs], self._replay(statements[0], pairs[0][0], records, nudge=True)

    def _replay(
        self, said: StageStatement, dtype: ActivationDtype, records: Sequence[StageRecord], *, nudge: bool
    ) -> list[Replayed]:
        received = [record.received for record in records]
        return replay(self._layers, (said.start, said.stop), dtype, received, nudge=nudge)
