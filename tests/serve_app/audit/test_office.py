"""An auditor's office, its log on disk, and the standings that its verdicts come to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.auditor import Auditor
from serve_app.audit.book import StandingBook, ask_to_readmit, asked_to_readmit
from serve_app.audit.desk import Drawn, Note
from serve_app.audit.draw import secret_commitment
from serve_app.audit.office import AuditOffice, News
from serve_app.audit.showing import most_bytes, shown_bytes
from serve_app.audit.standing import STRIKES, State
from serve_app.audit.verdict import Verdict
from serve_app.errors import ReceiptError
from serve_app.messages.record import StageRecord
from serve_app.receipts.log import TreeHead, require_included
from serve_app.receipts.log_file import LogFile
from serve_app.receipts.statement import envelope_cid
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError
from shard_tools.signing import Envelope, PublicKey, Signer
from tests.serve_app.audit.rehearsed import (
    AUDITOR,
    OTHER,
    REPLAY,
    auditor,
    exact_auditor,
    exact_house,
    model,
    whole_house,
)

NODE = OTHER.public


def office(folder: Path, known: Auditor | None = None) -> AuditOffice:
    return AuditOffice(folder, AUDITOR, whole_house().operator, lambda: known or auditor())


def noted(desk: AuditOffice, n: int = 1) -> list[Note]:
    notes = [Note(f"r{i}~1", answer.bundle, True, b"c" * 32) for i, answer in enumerate(whole_house().answers[:n])]
    desk.note(notes, b"c" * 32, ())
    return notes


def drawn(note: Note, stage: int) -> Drawn:
    return Drawn(note.id, note.cid, stage, note.certain)


def shown(stage: int, record: StageRecord | None = None) -> bytes:
    answer = whole_house().answers[0]
    said = answer.checked.statements[stage]
    rows = record or answer.records[stage]
    return shown_bytes(said.request_hash, said.attempt, stage, rows, whole_house().sessions[0])


def verdict_of(news: News) -> Verdict:
    value = canonical.decode(news.verdict, max_bytes=1 << 16)
    return Verdict.open(Envelope.from_value(value, "verdict", 1 << 16), frozenset((AUDITOR.public,)))


def test_an_honest_answer_passes_and_its_verdict_and_receipt_are_proved_to_be_in_the_log(tmp_path: Path) -> None:
    """Everything that a client needs for that comes in one answer."""
    desk = office(tmp_path)
    (note,) = noted(desk)
    before = desk.lookup("r0")
    assert before is not None and before["audit"]["state"] == "not drawn"  # type: ignore[call-overload,index]
    for stage in (0, 1):
        said = desk.begin(drawn(note, stage))
        assert said == whole_house().answers[0].checked.statements[stage]
        assert len(shown(stage)) <= most_bytes(said.n_rows, 64)
        desk.judge(drawn(note, stage), shown(stage))
    assert [verdict_of(news).finding for news in desk.news] == ["pass", "pass"]
    assert desk.settled == ["r0~1"] * 2
    found: Any = desk.lookup("r0")
    assert found["audit"]["verdict"]["finding"] == "pass" and not found["audit"]["independent"]
    sealed = Envelope.from_value(canonical.decode(found["log"]["head"], max_bytes=4096), "head", 4096)
    head = TreeHead.open(sealed, AUDITOR.public)
    signed = Envelope.from_value(canonical.decode(found["audit"]["verdict"]["signed"], max_bytes=4096), "v", 4096)
    for what, cid in (("receipt", note.cid), ("verdict", envelope_cid(signed))):
        require_included(bytes(cid), found["log"][what]["index"], head, found["log"][what]["path"])
    assert desk.lookup("r1") is None
    desk.close()


def test_what_a_stage_shows_is_judged_for_what_it_is(tmp_path: Path) -> None:
    """Rows it did not sign for: forged, proven by itself. Bytes that nobody signed for showing: refused."""
    desk = office(tmp_path)
    (note,) = noted(desk)
    good = shown(1)
    right = whole_house().answers[0].records[1]
    forged = shown(1, StageRecord(right.received, right.sent[:-4] + b"\0\0\0\1"))
    desk.judge(drawn(note, 1), forged)
    assert verdict_of(desk.news[-1]).finding == "forged" and desk.news[-1].node == whole_house().node
    assert [p.read_bytes() for p in (tmp_path / "forged").glob("*.shown")] == [forged]
    for bad in (b"", b"\0" * 40, good[:-1], good[:-1] + b"x", shown(0)):
        desk.judge(drawn(note, 1), bad)
        assert desk.news[-1].refused and desk.news[-1].verdict == b"", bad[:40]
    narrow = Auditor(*model(), REPLAY, (), AUDITOR)
    other = office(tmp_path / "uncalibrated", narrow)
    (note,) = noted(other)
    other.judge(drawn(note, 1), good)
    assert verdict_of(other.news[-1]).finding == "uncalibrated"
    with pytest.raises(ReceiptError, match="not here"):
        desk.begin(Drawn("r7", note.cid, 0, True))
    desk.close()
    other.close()


def test_an_answer_whose_bits_were_promised_is_held_to_them_or_is_not_audited(tmp_path: Path) -> None:
    """Equal for an auditor of the stages' profile; no verdict from one of another, however well it could estimate."""
    house = exact_house()
    answer = house.answers[0]
    assert answer.checked.receipt.assurance == "exact"
    for name, known, state in (("same", exact_auditor(), "equal"), ("other", auditor(), "unaudited")):
        desk = AuditOffice(tmp_path / name, AUDITOR, house.operator, lambda known=known: known)  # type: ignore[misc]
        note = Note("r0", answer.bundle, True, b"c" * 32)
        desk.note([note], b"c" * 32, ())
        said = desk.begin(drawn(note, 1))
        desk.judge(
            drawn(note, 1), shown_bytes(said.request_hash, said.attempt, 1, answer.records[1], house.sessions[1])
        )
        found: Any = desk.lookup("r0")
        assert (found["assurance"], found["audit"]["state"]) == ("exact", state), found["audit"]
        if state == "equal":
            assert (
                found["audit"]["verdict"]["window"] == [0, said.n_rows] and verdict_of(desk.news[-1]).finding == "equal"
            )
        else:
            assert found["audit"]["verdict"] is None and "cannot repeat them" in found["audit"]["why"]
        desk.close()


def test_a_receipt_that_does_not_verify_is_not_audited(tmp_path: Path) -> None:
    desk = AuditOffice(tmp_path, AUDITOR, Signer.fresh().public, auditor)
    (note,) = noted(desk)
    with pytest.raises(ReceiptError, match="does not verify"):
        desk.begin(drawn(note, 0))
    desk.close()


def test_a_told_secret_is_shown_beside_what_it_decided(tmp_path: Path) -> None:
    desk, secret = office(tmp_path), b"s" * 32
    desk.note([Note("r0", whole_house().answers[0].bundle, False, secret_commitment(secret))], b"", ())
    found: Any = desk.lookup("r0")
    assert found["audit"]["secret"] is None
    desk.note([], b"", (secret,))
    found = desk.lookup("r0")
    assert found["audit"]["secret"] == secret
    desk.close()


def test_a_log_goes_on_where_it_was_and_says_if_somebody_rewrote_it(tmp_path: Path) -> None:
    """A torn last entry is cut off; what was signed for must be there."""
    entries = [Cid.of(Codec.RAW, b"%d" % i) for i in range(9)]
    log = LogFile(tmp_path, AUDITOR)
    heads = [log.append(entries[:4], 1), log.append(entries[2:], 2)]
    assert [head.size for head in heads] == [4, 9]
    log.close()
    with (tmp_path / "log").open("ab") as f:
        f.write(b"torn")
    log = LogFile(tmp_path, AUDITOR)
    assert log.log.root() == heads[1].root and log.append([], 3).size == 9
    log.close()
    data = (tmp_path / "log").read_bytes()
    for other in (data[:-36], data[:36] + data):
        (tmp_path / "log").write_bytes(other)
        with pytest.raises(ReceiptError, match="other entries"):
            LogFile(tmp_path, AUDITOR)
    (tmp_path / "log.head").write_bytes(b"x")
    with pytest.raises(FormatError):
        LogFile(tmp_path, AUDITOR)
    with pytest.raises(InputError):
        LogFile(tmp_path / "log", AUDITOR)


def test_standings_outlive_who_keeps_the_book(tmp_path: Path) -> None:
    """One owner's faults make a suspect, a proof quarantines, the operator readmits; a spoiled file is refused."""
    path = tmp_path / "audit" / "standing"
    fault = Verdict(CID, bytes(32), 1, NODE, "fault", 0, 10**9, 0, 1, 0, 0, 9, CID, AUDITOR.public, 0, 0)
    for _ in range(50):
        book = StandingBook(path)
        assert book.judged(fault, "operator").state is State.SUSPECT
    assert StandingBook(path).of(NODE).evidence == {"operator": pytest.approx(min(1e3**50, (1 << 53) / 1000), rel=1e-3)}
    liar = PublicKey(b"l" * 32)
    book.judged(dataclasses.replace(fault, node=liar, finding="forged", calibration=None), "operator")
    for _ in range(STRIKES):
        book.refused(PublicKey(b"s" * 32), "it says nothing")
    again = StandingBook(path)
    assert again.quarantined() == {liar} and again.of(PublicKey(b"s" * 32)).state is State.SUSPECT
    assert again.readmit(liar).state is State.PROBATION and again.readmit(NODE).state is State.SUSPECT
    assert StandingBook(path).of(liar).audited_always and len(again.state()) == 3
    ask_to_readmit(path.parent, liar)
    (path.parent / "readmit" / "something else").touch()
    assert asked_to_readmit(path.parent) == [liar] and asked_to_readmit(path.parent) == []
    with pytest.raises(InputError):
        ask_to_readmit(path / "nowhere", liar)
    path.write_bytes(b"x")
    with pytest.raises(FormatError):
        StandingBook(path)


CID = Cid.of(Codec.DAG_CBOR, b"")
