"""A stage that does not compute what it signs is found by replaying it alone, and nobody else is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from serve_app.audit.auditor import Auditor
from serve_app.audit.calibration import Calibration
from serve_app.audit.standing import Standing, after_verdict
from serve_app.audit.verdict import VERDICT_TYPE, Verdict, commit, revealed
from serve_app.engine.dishonest import DISHONEST
from serve_app.errors import AuditError
from serve_app.messages.record import StageRecord
from serve_app.receipts.rows import Boundary, RowTree
from serve_app.receipts.statement import StageStatement
from serve_app.rehearsal import Rehearsed
from shard_tools import canonical
from shard_tools.errors import FormatError, SignatureError
from shard_tools.signing import Envelope
from tests.serve_app.audit.rehearsed import AUDITOR, OTHER, REPLAY, answered, auditor, calibrations, honest, model

NOW_MS = 1_790_000_000_000


def findings(one: Rehearsed) -> list[str]:
    """Of each stage."""
    return [audited(one, stage).verdict.finding for stage in range(len(one.statements))]


def audited(one: Rehearsed, stage: int, record: StageRecord | None = None):  # type: ignore[no-untyped-def]
    return auditor().audit(one.statements[stage], record or one.records[stage], OTHER.public, NOW_MS)


def test_honest_stages_pass() -> None:
    """Other prompts than those of the calibration; prefill and decode against one parallel pass."""
    for one in answered(count=4):
        assert findings(one) == ["pass", "pass"]


@pytest.mark.parametrize("cheat", sorted(DISHONEST))
@pytest.mark.parametrize("stage", [0, 1])
def test_a_cheating_stage_is_found_and_no_other_blamed(cheat: str, stage: int) -> None:
    """Its receipt verifies all the same: signatures say who, not whether it is true."""
    (one,) = answered({stage: cheat})
    expected = ["pass", "pass"]
    expected[stage] = "fault"
    assert findings(one) == expected


def test_two_neighbours_that_both_cheat_are_both_found() -> None:
    """Each is judged from what it received."""
    (one,) = answered({0: "fp8", 1: "skip-layer"})
    assert findings(one) == ["fault", "fault"]


def test_rows_that_do_not_open_what_was_signed_blame_who_shows_them() -> None:
    """One bit, one row too few, another request's rows: forged, signed by the auditor, about the holder."""
    one, other = honest()[0], honest()[1]
    record = one.records[1]
    flipped = bytes([record.sent[0] ^ 1]) + record.sent[1:]
    for forged in (
        dataclasses.replace(record, sent=flipped),
        dataclasses.replace(record, received=record.received[:-1]),
        dataclasses.replace(record, received=b""),
        other.records[1],
    ):
        found = audited(one, 1, forged)
        assert (found.verdict.finding, found.verdict.node, found.judgement) == ("forged", OTHER.public, None)


def test_what_cannot_be_judged_gets_no_verdict() -> None:
    """Nothing calibrated, another profile, other shards, another model: AuditError, which blames nobody."""
    one = honest()[0]
    said = one.receipt.statements[1]
    other = dataclasses.replace(calibrations()[1], auditor="somebody else's")
    for known in ((), (other,), (calibrations()[0],)):
        found = Auditor(*model(), REPLAY, known, AUDITOR).audit(one.statements[1], one.records[1], OTHER.public, NOW_MS)
        assert found.verdict.finding == "uncalibrated" and found.verdict.node == said.node
        assert Verdict.open(found.envelope, frozenset((AUDITOR.public,))) == found.verdict
        assert after_verdict(Standing(), found.verdict, "an owner") == Standing()
    with pytest.raises(AuditError, match="channels"):
        narrow = dataclasses.replace(calibrations()[1], sizes=calibrations()[1].sizes[:-1])
        Auditor(*model(), REPLAY, (narrow,), AUDITOR).audit(one.statements[1], one.records[1], OTHER.public, NOW_MS)
    for changes, match in (
        ({"shards": said.shards[:-1]}, "other shards"),
        ({"start": 0}, "other shards"),
        ({"stop": 99}, "not in"),
        ({"n_rows": 1 << 20}, "in a context of"),
    ):
        statement = Envelope("", dataclasses.replace(said, **changes).encode(), OTHER.public, bytes(64))
        with pytest.raises(AuditError, match=match):
            auditor().audit(statement, one.records[1], OTHER.public, NOW_MS)


def test_rows_that_are_no_numbers_are_the_fault_of_who_sent_them() -> None:
    """NaN sent is an infinite error; NaN received cannot be computed from."""
    one = honest()[0]
    said = one.receipt.statements[1]
    nan = np.full(len(one.records[1].received) // 4, np.nan, "<f4").tobytes()

    def root(layer: int) -> bytes:
        tree = RowTree(Boundary(said.manifest, layer, "float32", 64))
        tree.append(0, nan)
        return tree.root()

    sent = StageRecord(one.records[1].received, nan)
    statement = Envelope("", dataclasses.replace(said, out_root=root(said.stop)).encode(), OTHER.public, bytes(64))
    assert auditor().audit(statement, sent, OTHER.public, NOW_MS).verdict.finding == "fault"
    received = StageRecord(nan, one.records[1].sent)
    statement = Envelope("", dataclasses.replace(said, in_root=root(said.start)).encode(), OTHER.public, bytes(64))
    with pytest.raises(AuditError, match="neighbour"):
        auditor().audit(statement, received, OTHER.public, NOW_MS)


def test_a_calibration_round_trips_and_bad_ones_are_refused() -> None:
    """decode(encode(c)) == c; a zero size, falling deciles, a short list, unknown windows: FormatError."""
    made = calibrations()[0]
    assert Calibration.decode(made.encode()) == made
    value = canonical.decode(made.encode(), max_bytes=1 << 20)
    assert isinstance(value, dict)
    tails = value["tails"]
    assert isinstance(tails, list)
    good = tails[0]
    assert isinstance(good, list)
    for changes in (
        {"sizes": bytes(256)},
        {"sizes": b"abc"},
        {"tails": []},
        {"tails": [[4, *good[1:]]]},
        {"tails": [[*good[:2], list(reversed(good[2])), *good[3:]]]},  # type: ignore[call-overload,arg-type]
        {"tails": [[*good[:3], 0, *good[4:]]]},
        {"tails": [[*good[:4], 600_000, *good[5:]]]},
        {"tails": [[True, *good[1:]]]},
        {"tails": [good[:5]]},
        {"tails": [7]},
        {"start": -1},
        {"more": 1},
    ):
        with pytest.raises(FormatError):
            Calibration.decode(canonical.encode(value | changes))


def test_a_verdict_round_trips_and_speaks_for_its_signer_alone() -> None:
    """open(seal(v)) == v; another type, another signer, another finding are refused."""
    found = audited(honest()[0], 0)
    keys = frozenset((AUDITOR.public, OTHER.public))
    assert Verdict.open(found.envelope, keys) == found.verdict
    with pytest.raises(SignatureError):
        Verdict.open(found.envelope, frozenset((OTHER.public,)))
    stolen = Envelope.seal(OTHER, VERDICT_TYPE, found.envelope.payload)
    with pytest.raises(FormatError, match="another key"):
        Verdict.open(stolen, keys)
    with pytest.raises(SignatureError):
        Verdict.open(dataclasses.replace(found.envelope, payload_type="other"), keys)
    with pytest.raises(FormatError):
        Verdict.decode(dataclasses.replace(found.verdict, calibration=None).encode())
    assert StageStatement.decode(honest()[0].statements[0].payload).node == found.verdict.node


def test_a_commitment_opens_to_one_verdict_only() -> None:
    """And not to a copier's, whose key is in what it would have to open."""
    verdict, salt = audited(honest()[0], 0).verdict, b"s" * 32
    committed = commit(verdict, salt)
    assert revealed(committed, verdict, salt)
    assert not revealed(committed, dataclasses.replace(verdict, auditor=OTHER.public), salt)
    assert not revealed(committed, verdict, b"t" * 32) and not revealed(committed, verdict, b"")
