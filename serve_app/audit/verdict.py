"""What an auditor says of one stage of one request, and how it comes to it.

The rule, on the errors of all rows and an honest calibration of the same kind:
    p         the least p-value of any window of any calibrated length, times the number of windows looked at
    pass      p > 1e-4: an honest stage does this all the time
    suspect   between: another auditor should look
    fault     p <= 1e-6, and the window errs by more than GUARD times what the calibration ever saw: no honest stage
    evidence  an e-value, of which the mean is at most 1 if the stage is honest: audits that each show nothing add up
Rows that do not open what was signed are the holder's fault ("forged"), whatever they hold. Rows that do, of a stage of
a kind that nobody has calibrated, are "uncalibrated": that says nothing for it or against it. Of a stage whose bits can
be repeated (exact.py) the rows are "equal" or "unequal", and nothing is estimated. Law:
`Verdict.open(v.seal(s), keys) == v`. Bytes: PROTOCOL.md. A verdict is a word of one auditor; standing.py weighs words.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, cast

from serve_app.audit.calibration import Calibration
from serve_app.audit.error import Floats, window_means
from serve_app.audit.tail import MAX_PICO, MICRO, PICO, Tail, scaled
from serve_app.receipts.identity import MAX_EPOCH, MAX_TIME
from serve_app.receipts.statement import HASH_BYTES, MAX_ROWS, MAX_STAGES, StageStatement
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey, Signer

VERDICT_TYPE = "application/vnd.llmd.verdict.v2+dag-cbor"
MAX_VERDICT_BYTES = 2 << 10

Finding = Literal["pass", "suspect", "fault", "forged", "uncalibrated", "equal", "unequal"]
_FINDINGS = ("pass", "suspect", "fault", "forged", "uncalibrated", "equal", "unequal")
_WITHOUT_CALIBRATION = ("forged", "uncalibrated", "equal", "unequal")
HARMLESS: frozenset[Finding] = frozenset(("pass", "uncalibrated", "equal"))  # nobody is blamed by it

SUSPECT_P, FAULT_P = 1e-4, 1e-6
# A fit is only as good as its sample: beyond what was ever seen, an error must also be plainly larger. int8 weights and
# 8-bit keys in one stage of a bfloat16 model err three times as much as its largest honest window.
GUARD = 1.25
_KAPPA = 0.5  # of e = kappa * p ** (kappa - 1), an e-value of any p-value: Vovk and Wang 2021
_LEAST_P = 1e-12
LEAST_EVIDENCE = _KAPPA  # of any audit: p is 1
_COMMIT_TAG = b"llmd.verdict.v2\0"
SALT_BYTES = 32


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rows of one stage and request show."""

    finding: Finding
    p: float
    evidence: float  # e-value
    first: int  # position of the window that shows most
    tokens: int  # in it
    error: float  # its mean
    limit: float  # the error at which p alone would be FAULT_P


def judge(errors: Floats, calibration: Calibration) -> Judgement:
    """The judgement of the errors [rows] of one request."""
    assert len(errors) > 0
    parts = [(tail, window_means(errors, tail.tokens)) for tail in calibration.tails]
    looked = sum(len(means) for _, means in parts)
    worst: tuple[float, float, Tail, int] | None = None
    evidence = 0.0
    proven = False
    for tail, means in parts:
        for i, mean in enumerate(means.tolist()):
            p = min(1.0, tail.p_value(mean) * looked)
            proven |= p <= FAULT_P and mean > GUARD * tail.largest
            # The mean of e-values is one, however they depend on each other.
            evidence += _e_value(tail.p_value(mean)) / looked
            if worst is None or (p, -mean / tail.limit(FAULT_P)) < (worst[0], -worst[1] / worst[2].limit(FAULT_P)):
                worst = p, mean, tail, i
    assert worst is not None, "windows of one row are calibrated, and there is a row"
    p, mean, tail, i = worst
    finding: Finding = "fault" if proven else "suspect" if p <= SUSPECT_P else "pass"
    limit = max(tail.limit(min(0.1, FAULT_P / looked)), GUARD * tail.largest)
    return Judgement(finding, p, evidence, i * tail.tokens, tail.tokens, mean, limit)


def _e_value(p: float) -> float:
    return _KAPPA / math.sqrt(max(p, _LEAST_P))


@dataclass(frozen=True, slots=True)
class Verdict:
    """One auditor's finding about one statement."""

    statement: Cid  # of the signed statement that was judged
    request_hash: bytes
    stage: int
    node: PublicKey  # that is judged
    finding: Finding
    p_pico: int  # in 1e-12, rounded up
    evidence_micro: int
    first: int
    tokens: int  # 0: nothing was compared; of "equal": all rows
    error_pico: int
    limit_pico: int
    rows: int
    calibration: Cid | None  # None: what was found needs none
    auditor: PublicKey  # its node
    epoch: int
    at_ms: int

    @classmethod
    def of(
        cls,
        judgement: Judgement,
        *,
        statement: Cid,
        request_hash: bytes,
        stage: int,
        node: PublicKey,
        rows: int,
        calibration: Cid,
        auditor: PublicKey,
        epoch: int,
        at_ms: int,
    ) -> Verdict:
        """The verdict that says what was judged."""
        return cls(
            statement,
            request_hash,
            stage,
            node,
            judgement.finding,
            scaled(judgement.p, PICO),
            scaled(judgement.evidence, MICRO),
            judgement.first,
            judgement.tokens,
            scaled(judgement.error, PICO),
            scaled(judgement.limit, PICO),
            rows,
            calibration,
            auditor,
            epoch,
            at_ms,
        )

    @classmethod
    def without(
        cls,
        finding: Literal["forged", "uncalibrated"],
        *,
        statement: Cid,
        said: StageStatement,
        node: PublicKey,
        auditor: PublicKey,
        at_ms: int,
    ) -> Verdict:
        """A verdict for which no rows were compared. node: whom it is about."""
        p_pico = PICO if finding == "uncalibrated" else 0
        request, stage, rows, epoch = said.request_hash, said.stage, said.n_rows, said.epoch
        return cls(statement, request, stage, node, finding, p_pico, 0, 0, 0, 0, 0, rows, None, auditor, epoch, at_ms)

    @classmethod
    def exact(
        cls, first_unequal: int | None, *, statement: Cid, said: StageStatement, auditor: PublicKey, at_ms: int
    ) -> Verdict:
        """The verdict of a comparison bit by bit. first_unequal: a position, or None for no such row.

        Of the numbers only the window means anything; the evidence is that of a p-value of 1, or of 0.
        """
        p = 1.0 if first_unequal is None else 0.0
        return cls(
            statement,
            said.request_hash,
            said.stage,
            said.node,
            "equal" if first_unequal is None else "unequal",
            scaled(p, PICO),
            scaled(_e_value(p), MICRO),
            first_unequal or 0,
            said.n_rows if first_unequal is None else 1,
            0,
            0,
            said.n_rows,
            None,
            auditor,
            said.epoch,
            at_ms,
        )

    def encode(self) -> bytes:
        """The payload that is signed."""
        return canonical.encode(
            {
                "v": 2,
                "statement": self.statement,
                "request": self.request_hash,
                "stage": self.stage,
                "node": self.node,
                "finding": self.finding,
                "p_pico": self.p_pico,
                "evidence_micro": self.evidence_micro,
                "window": [self.first, self.tokens],
                "error_pico": self.error_pico,
                "limit_pico": self.limit_pico,
                "rows": self.rows,
                "calibration": self.calibration,
                "auditor": self.auditor,
                "epoch": self.epoch,
                "at_ms": self.at_ms,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> Verdict:
        """Read a payload; whoever calls has checked its signature, or will. Raises FormatError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_VERDICT_BYTES), "verdict") as f:
            f.integer("v", 2, 2)
            finding = f.text("finding", 20)
            if finding not in _FINDINGS:
                raise FormatError(f"verdict.finding: {finding!r} is none of {', '.join(_FINDINGS)}")
            window = f.integers("window", 2, 0, MAX_ROWS)
            calibration = f.any("calibration")
            if len(window) != 2 or not (calibration is None or isinstance(calibration, Cid)):
                raise FormatError("verdict.window is no pair, or verdict.calibration no link")
            if (calibration is None) != (finding in _WITHOUT_CALIBRATION):
                raise FormatError("verdict.calibration: errors are judged by one, and a finding without is another")
            return cls(
                f.link("statement"),
                f.data("request", HASH_BYTES, HASH_BYTES),
                f.integer("stage", 0, MAX_STAGES - 1),
                PublicKey(f.data("node", KEY_BYTES, KEY_BYTES)),
                cast(Finding, finding),
                f.integer("p_pico", 0, PICO),
                f.integer("evidence_micro", 0, MAX_PICO),
                *window,
                f.integer("error_pico", 0, MAX_PICO),
                f.integer("limit_pico", 0, MAX_PICO),
                f.integer("rows", 0, MAX_ROWS),
                calibration,
                PublicKey(f.data("auditor", KEY_BYTES, KEY_BYTES)),
                f.integer("epoch", 0, MAX_EPOCH),
                f.integer("at_ms", 0, MAX_TIME),
            )

    def seal(self, auditor: Signer) -> Envelope:
        """The verdict as the auditor's node signs it. `auditor` must be the node's own key."""
        assert auditor.public == self.auditor
        return Envelope.seal(auditor, VERDICT_TYPE, self.encode())

    @classmethod
    def open(cls, envelope: Envelope, auditors: frozenset[PublicKey]) -> Verdict:
        """The verdict, once one of these auditors is known to have signed it in its own name.

        Raises SignatureError, FormatError.
        """
        verdict = cls.decode(envelope.open(VERDICT_TYPE, auditors, "an auditor"))
        if verdict.auditor != envelope.key:
            raise FormatError("verdict.auditor: it is signed by another key than it speaks for")
        return verdict


def commit(verdict: Verdict, salt: bytes) -> bytes:
    """32 bytes that an auditor publishes before any of them says its verdict: nobody can copy what it cannot read.

    They bind the auditor too (its key is in the verdict): one that was copied opens to nothing of the copier's.
    """
    assert len(salt) == SALT_BYTES
    return hashlib.sha256(_COMMIT_TAG + salt + verdict.encode()).digest()


def revealed(commitment: bytes, verdict: Verdict, salt: bytes) -> bool:
    """Whether this verdict is the one that was committed to."""
    return len(salt) == SALT_BYTES and commit(verdict, salt) == commitment
