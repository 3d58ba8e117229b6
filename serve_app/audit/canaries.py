"""The side of whoever makes canaries: which are out, what came of each, and what that makes of an auditor.

    TRUSTED ──MISSES misses of one owner's canaries──> DOUBTED ──the same of a second owner's──> OUT

One miss may be one broken machine's; two are none (an honest auditor misses one in 10^6 at most, by what a fault is). A
doubted auditor's verdicts change no standing; one that is out is drawn no more. Makers may lie about outcomes, hence
two owners, as of auditors who accuse nodes. Verdicts about canaries are no verdicts: they are taken out before the
standings of nodes are kept. Pure: no clock, no I/O.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from serve_app.audit.canary import MAX_BATCH, SALT_BYTES, Answer, Canary, Logged, Miss, Outcome, verdict_about
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.verdict import Verdict
from serve_app.messages.record import StageRecord
from serve_app.receipts.statement import envelope_cid
from shard_tools.canonical import Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope, PublicKey, Signer

MISSES = 2


class Trust(Enum):
    """Of an auditor."""

    TRUSTED = "trusted"
    DOUBTED = "doubted"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class AuditorStanding:
    """What canaries show of one auditor."""

    met: int = 0
    unanswered: int = 0  # it found nothing that would meet or contradict the outcome
    misses: Mapping[str, frozenset[bytes]] = field(default_factory=dict)  # by owner of makers: leaves, each once

    @property
    def trust(self) -> Trust:
        """However many one owner has seen missed, it takes a second."""
        owners = sum(len(missed) >= MISSES for missed in self.misses.values())
        return (Trust.TRUSTED, Trust.DOUBTED, Trust.OUT)[min(owners, 2)]


def after_answer(standing: AuditorStanding, answer: Answer) -> AuditorStanding:
    """The standing once a canary was judged; a miss counts when it is proved: after_miss."""
    if answer == "met":
        return replace(standing, met=standing.met + 1)
    return replace(standing, unanswered=standing.unanswered + (answer == "unanswered"))


def after_miss(standing: AuditorStanding, miss: Miss, owner: str) -> AuditorStanding:
    """The standing once a maker of `owner` has proved this. `miss.convicted()` has named this auditor."""
    missed = standing.misses.get(owner, frozenset()) | {miss.canary.leaf}
    return replace(standing, misses={**standing.misses, owner: missed})


def canaries_of(statement: Envelope, record: StageRecord, outcomes: Mapping[bool, Outcome]) -> list[Canary]:
    """Of one stage's statement and the rows behind it. outcomes: by whether it is about draws."""
    cid, shown = envelope_cid(statement), hashlib.sha256(record.encode()).digest()
    return [Canary(cid, draws, outcome, shown, secrets.token_bytes(SALT_BYTES)) for draws, outcome in outcomes.items()]


class Canaries:
    """One maker's, of one auditor."""

    def __init__(self, auditor: PublicKey, maker: Signer) -> None:
        self._auditor, self._maker = auditor, maker
        self._out: dict[tuple[Cid, bool], tuple[Canary, tuple[bytes, ...]]] = {}
        self._mine: set[Cid] = set()  # statements, also of those that were judged
        self.standing = AuditorStanding()

    def commit(self, canaries: Sequence[Canary]) -> tuple[bytes, ...]:
        """The leaves whose batch_commitment the auditor is to log before it is given any of them."""
        assert 0 < len(canaries) <= MAX_BATCH
        leaves = tuple(canary.leaf for canary in canaries)
        for canary in canaries:
            self._out[canary.statement, canary.draws] = canary, leaves
            self._mine.add(canary.statement)
        return leaves

    def is_one(self, verdict: Envelope) -> bool:
        """Whether it is about a canary's statement: it is to change no node's standing. Raises FormatError."""
        return verdict_about(verdict)[0] in self._mine

    def judged(self, verdict: Envelope) -> Answer | None:
        """What the auditor's verdict is worth; None if it is about no canary that is out.

        A miss is counted once it is proved (`proved`). Raises SignatureError, FormatError.
        """
        about = verdict_about(verdict)
        known = self._out.get(about)
        if known is None:
            return None
        keys = frozenset((self._auditor,))
        finding = (DrawVerdict.open(verdict, keys) if about[1] else Verdict.open(verdict, keys)).finding
        answer = known[0].answered(finding)
        if answer != "missed":
            del self._out[about]
            self.standing = after_answer(self.standing, answer)
        return answer

    def proved(self, verdict: Envelope, head: Envelope, proofs: Iterable[Value], owner: str) -> Envelope:
        """The miss, signed and counted. proofs: of the batch's commitment and of the verdict, as AuditOffice.prove's.

        Raises AuditError, ReceiptError, FormatError, SignatureError if it is none: an auditor that does not show its
        log has not been proved wrong.
        """
        about = verdict_about(verdict)
        if about not in self._out:
            raise FormatError("the verdict is about no canary that is out")
        canary, leaves = self._out[about]
        committed, judged = (Logged.from_value(proof) for proof in proofs)
        miss = Miss(leaves, canary, verdict, head, committed, judged)
        if miss.convicted() != self._auditor:
            raise FormatError("the verdict is another auditor's")
        del self._out[about]
        self.standing = after_miss(self.standing, miss, owner)
        return miss.seal(self._maker)
