"""An auditor's office, its log on disk, and the standings that its verdicts come to."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.audit.answer_file import AnswerFile
from serve_app.audit.auditor import Auditor
from serve_app.audit.band import DrawBand
from serve_app.audit.book import StandingBook, ask_to_readmit, asked_to_readmit
from serve_app.audit.case import Case, Look
from serve_app.audit.desk import Drawn, Note
from serve_app.audit.draw import secret_commitment
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.office import AuditOffice, News
from serve_app.audit.showing import most_bytes, shown_bytes
from serve_app.audit.standing import STRIKES, State
from serve_app.audit.verdict import Verdict
from serve_app.cli import app
from serve_app.errors import ReceiptError
from serve_app.messages.record import StageRecord
from serve_app.messages.request import Sampling
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.log import TreeHead, require_included
from serve_app.receipts.log_file import LogFile
from serve_app.receipts.statement import StatementChain, envelope_cid
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError
from shard_tools.signing import Envelope, PublicKey, Signer, key_text
from tests.serve_app.audit.redrawn import band, redrawer_of
from tests.serve_app.audit.rehearsed import (
    AUDITOR,
    OTHER,
    REPLAY,
    House,
    auditor,
    exact_auditor,
    exact_house,
    model,
    whole_house,
)
from tests.serve_app.receipts.pipeline_of_three import Cluster, a_request

NODE = OTHER.public


def office(
    folder: Path, known: Auditor | None = None, bands: tuple[DrawBand, ...] | None = None, house: House | None = None
) -> AuditOffice:
    judged_by = (band(),) if bands is None else bands
    operator = (house or whole_house()).operator
    return AuditOffice(folder, AUDITOR, operator, lambda: known or auditor(), lambda: redrawer_of(judged_by))


def noted(desk: AuditOffice, house: House | None = None) -> Note:
    note = Note("r0~1", (house or whole_house()).answers[0].bundle, True, b"c" * 32)
    desk.note([note], b"c" * 32, ())
    return note


def drawn(note: Note, stage: int) -> Drawn:
    return Drawn(note.id, note.cid, stage, note.certain)


def shown(stage: int, record: StageRecord | None = None, house: House | None = None) -> bytes:
    house = house or whole_house()
    answer = house.answers[0]
    said = answer.checked.statements[stage]
    rows = record or answer.records[stage]
    return shown_bytes(said.request_hash, said.attempt, stage, rows, house.sessions[0])


def audited(desk: AuditOffice, note: Note, stage: int, house: House | None = None) -> Any:
    """What is known of it once every stage that is asked has shown its rows."""
    for said in desk.begin(drawn(note, stage)):
        desk.judge(drawn(note, stage), said.stage, shown(said.stage, house=house))
    found: Any = desk.lookup("r0")
    return found


def verdict_of(news: News) -> Verdict:
    value = canonical.decode(news.verdict, max_bytes=1 << 16)
    return Verdict.open(Envelope.from_value(value, "verdict", 1 << 16), frozenset((AUDITOR.public,)))


def envelope(signed: bytes) -> Envelope:
    return Envelope.from_value(canonical.decode(signed, max_bytes=4096), "verdict", 4096)


def test_an_honest_answer_passes_and_its_verdicts_and_receipt_are_proved_to_be_in_the_log(tmp_path: Path) -> None:
    """Whichever stage is drawn, its tokens are drawn again too. All that a client needs comes in one answer."""
    for stage in (0, 1):
        desk = office(tmp_path / str(stage))
        note = noted(desk)
        before: Any = desk.lookup("r0")
        assert (before["audit"]["state"], before["audit"]["draws"]["state"]) == ("not drawn", "not drawn")
        wanted = desk.begin(drawn(note, stage))
        assert [said.stage for said in wanted] == [0, 1][stage:]
        for said in wanted:
            assert desk.settled("") == [] and desk.status()["waiting"] == 1
            assert len(shown(said.stage)) <= most_bytes(said.n_rows, 64)
            desk.judge(drawn(note, stage), said.stage, shown(said.stage))
        assert desk.settled("another Head's") == [] and desk.settled("") == ["r0~1"] and desk.status()["waiting"] == 0
        assert [news.stage for news in desk.news] == [stage, 1]
        found: Any = desk.lookup("r0")
        audit, log = found["audit"], found["log"]
        assert audit["verdict"]["finding"] == audit["draws"]["verdict"]["finding"] == "pass"
        assert (audit["verdict"]["stage"], audit["draws"]["verdict"]["tokens"], audit["independent"]) == (
            stage,
            9,
            False,
        )
        head = TreeHead.open(envelope(log["head"]), AUDITOR.public)
        keys = frozenset((AUDITOR.public,))
        signed, draws = envelope(audit["verdict"]["signed"]), envelope(audit["draws"]["verdict"]["signed"])
        assert Verdict.open(signed, keys).node == DrawVerdict.open(draws, keys).node == whole_house().node
        for what, cid in (("receipt", note.cid), ("verdict", envelope_cid(signed)), ("draws", envelope_cid(draws))):
            require_included(bytes(cid), log[what]["index"], head, log[what]["path"])
        assert desk.lookup("r1") is None
        assert (desk.status()["judged"], desk.status()["redrawn"], desk.status()["samplers"]) == (1, 1, 0)
        desk.close()


def test_a_sampler_that_does_not_draw_as_asked_is_found_whichever_stage_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows pass; the verdict of draws names the last stage, which signed for them, is loud and counted."""
    house = whole_house(1, Sampling(seed=5), "other-seed")
    desk = office(tmp_path, house=house)
    for stage in (0, 1):
        note = noted(desk, house)
        caplog.clear()
        found = audited(desk, note, stage, house)
        assert (found["audit"]["state"], found["audit"]["draws"]["state"]) == ("pass", "sampler")
        verdict = DrawVerdict.open(envelope(found["audit"]["draws"]["verdict"]["signed"]), frozenset((AUDITOR.public,)))
        assert verdict.node == house.node and verdict.margin_pico > verdict.limit_pico
        assert [r.levelname for r in caplog.records if "drawn again: sampler" in r.message] == ["ERROR"]
    assert (desk.status()["samplers"], desk.status()["last_sampler"]) == (2, "r0")
    desk.close()


def test_without_a_band_the_draws_are_uncalibrated_and_never_a_pass(tmp_path: Path) -> None:
    """Also of a sampler that lies. The layers' verdict is there all the same, and each has its place in the log."""
    house = whole_house(1, Sampling(seed=5), "other-seed")
    desk = office(tmp_path, bands=(), house=house)
    found = audited(desk, noted(desk, house), 0, house)
    assert (found["audit"]["state"], found["audit"]["draws"]["state"]) == ("pass", "uncalibrated")
    assert found["audit"]["draws"]["verdict"]["band"] is None and found["log"]["draws"]["index"] == 3
    assert desk.status()["samplers"] == 0
    desk.close()


def test_what_a_stage_shows_is_judged_for_what_it_is(tmp_path: Path) -> None:
    """Rows it did not sign for: forged, proven by itself. Bytes that nobody signed for showing: refused."""
    right = whole_house().answers[0].records[1]
    forged = shown(1, StageRecord(right.received, right.sent[:-4] + b"\0\0\0\1"))
    for stage in (0, 1):  # asked for its own layers, or for the tokens alone: the same proof, once
        desk = office(tmp_path / str(stage))
        note = noted(desk)
        desk.begin(drawn(note, stage))
        desk.judge(drawn(note, stage), 1, forged)
        (news,) = desk.news
        assert (verdict_of(news).finding, verdict_of(news).stage, news.node) == ("forged", 1, whole_house().node)
        found: Any = desk.lookup("r0")
        assert found["audit"]["draws"]["state"] == found["audit"]["draws"]["verdict"]["finding"] == "forged"
        assert [p.read_bytes() for p in (tmp_path / str(stage) / "forged").glob("*.shown")] == [forged]
        desk.close()
    good = shown(1)
    for i, bad in enumerate((b"", b"\0" * 40, good[:-1], good[:-1] + b"x", shown(0))):
        desk = office(tmp_path / f"bad {i}")
        note = noted(desk)
        desk.begin(drawn(note, 1))
        desk.judge(drawn(note, 1), 1, bad)
        (news,) = desk.news
        assert news.refused and news.verdict == b"" and desk.settled("") == ["r0~1"], bad[:40]
        found = desk.lookup("r0")
        assert found["audit"]["state"] == found["audit"]["draws"]["state"] == "unaudited"
        assert found["audit"]["verdict"] is found["audit"]["draws"]["verdict"] is None
        desk.close()
    other = office(tmp_path / "uncalibrated", Auditor(*model(), REPLAY, (), AUDITOR))
    note = noted(other)
    found = audited(other, note, 1)
    assert (found["audit"]["state"], found["audit"]["draws"]["state"]) == ("uncalibrated", "pass")
    with pytest.raises(ReceiptError, match="not here"):
        other.begin(Drawn("r7", note.cid, 0, True))
    other.close()


def test_a_last_stage_that_shows_nothing_leaves_its_tokens_unaudited_and_the_drawn_stage_judged(tmp_path: Path) -> None:
    """What is still awaited is settled by it; and nothing that was said is taken back by a second asking."""
    desk = office(tmp_path)
    note = noted(desk)
    first, last = desk.begin(drawn(note, 0))
    desk.judge(drawn(note, 0), 0, shown(0))
    desk.gave_nothing(drawn(note, 0), last, "it has them no more", refused=True)
    found: Any = desk.lookup("r0")
    assert (found["audit"]["state"], found["audit"]["draws"]["state"]) == ("pass", "unaudited")
    assert found["audit"]["draws"]["why"] == "it has them no more" and found["log"]["draws"] is None
    assert [(news.stage, news.refused) for news in desk.news] == [(0, False), (1, True)] and desk.settled("") == [
        "r0~1"
    ]
    assert desk.begin(drawn(note, 0)) == ()
    for said in (first, last):
        desk.gave_nothing(drawn(note, 0), said, "asked again", refused=True)
    assert len(desk.news) == 2 and desk.lookup("r0") == found
    desk.close()


def test_an_answer_whose_bits_were_promised_is_held_to_them_or_is_not_audited(tmp_path: Path) -> None:
    """Equal for an auditor of the stages' profile; no verdict from one of another, however well it could estimate."""
    house = exact_house()
    assert house.answers[0].checked.receipt.assurance == "exact"
    for name, known, state in (("same", exact_auditor(), "equal"), ("other", auditor(), "unaudited")):
        desk = office(tmp_path / name, known, house=house)
        note = Note("r0~1", house.answers[0].bundle, True, b"c" * 32, exact=True)
        desk.note([note], b"c" * 32, ())
        found = audited(desk, note, 0, house)
        assert (found["assurance"], found["audit"]["state"]) == ("exact", state), found["audit"]
        if state == "equal":
            assert found["audit"]["verdict"]["window"] == [0, house.answers[0].checked.statements[0].n_rows]
            assert "equal" in {verdict_of(news).finding for news in desk.news if news.stage == 0}
        else:
            assert found["audit"]["verdict"] is None and "cannot repeat them" in found["audit"]["why"]
        desk.close()
        again: Any = office(tmp_path / name, known, house=house).lookup("r0")
        assert again["assurance"] == "exact"


def test_a_receipt_that_does_not_verify_is_not_audited(tmp_path: Path) -> None:
    desk = AuditOffice(tmp_path, AUDITOR, Signer.fresh().public, auditor, lambda: redrawer_of(()))
    with pytest.raises(ReceiptError, match="does not verify"):
        desk.begin(drawn(noted(desk), 0))
    found: Any = desk.lookup("r0")
    assert found["audit"]["state"] == found["audit"]["draws"]["state"] == "unaudited"
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


def test_what_was_found_is_known_after_a_restart_without_the_prompt(tmp_path: Path) -> None:
    """Verdicts, proofs, told secrets and the count of samplers; the receipt itself is the client's. Not what waited."""
    house, secret = whole_house(2, Sampling(seed=5), "other-seed"), b"s" * 32
    desk = office(tmp_path, house=house)
    notes = [Note(f"r{i}", answer.bundle, True, secret_commitment(secret)) for i, answer in enumerate(house.answers)]
    desk.note(notes, secret_commitment(secret), ())
    for said in desk.begin(drawn(notes[0], 0)):
        desk.judge(drawn(notes[0], 0), said.stage, shown(said.stage, house=house))
    desk.begin(drawn(notes[1], 0))
    desk.note([], b"", (secret,))
    before: Any = desk.lookup("r0")
    desk.close()
    prompt = bytes(canonical.encode(list(house.answers[0].checked.opening.prompt_ids)))
    assert prompt in before["receipt"] and not [
        p for p in tmp_path.glob("*") if p.is_file() and prompt in p.read_bytes()
    ]
    again = office(tmp_path, house=house)
    assert again.lookup("r0") == before | {"receipt": None} and before["audit"]["secret"] == secret
    assert again.lookup("r1") is None
    assert (again.status()["samplers"], again.status()["last_sampler"]) == (1, "r0")
    with pytest.raises(ReceiptError, match="not here"):
        again.begin(drawn(notes[0], 0))
    again.close()


def test_answers_on_disk_are_bounded_and_what_is_spoiled_is_lost_alone(tmp_path: Path) -> None:
    """The latest are there, oldest first; a torn or foreign end is cut off, and what comes behind is read again."""
    looks = Look("unaudited", "because"), Look("unaudited", "x" * 2000)
    cases = [Case(f"r{i}~2", CID, b"", True, b"c" * 32, bytes(32), "", 1, *looks) for i in range(50)]
    size = len(cases[10].encode()) + 4
    kept = AnswerFile(tmp_path, AUDITOR.public, 10 * size)
    for case in cases:
        kept.add(case)
    found = list(AnswerFile(tmp_path, AUDITOR.public, 10 * size).cases())
    assert [case.id for case in found] == [case.id for case in cases[30:]]
    assert (
        found[0] == dataclasses.replace(cases[30], draws=Look("unaudited", "x" * 1000)) and found[0].client_id == "r30"
    )
    foreign = Verdict(CID, bytes(32), 1, NODE, "fault", 0, 0, 0, 1, 0, 0, 9, CID, NODE, 0, 0).seal(OTHER)
    for spoiled in (b"\1", b"\0\0\0\0", b"\xff" * 9, dataclasses.replace(cases[0], draws=Look("fault", "", foreign))):
        data = spoiled if isinstance(spoiled, bytes) else struct.pack("<I", len(spoiled.encode())) + spoiled.encode()
        with (tmp_path / "answers").open("ab") as f:
            f.write(data)
        assert list(kept.cases()) == found
        kept.add(cases[0])
        found = list(kept.cases())
        assert found[-1].id == "r0~2"
    (tmp_path / "secrets").write_bytes(b"a" * 32 + b"torn")
    kept.tell([b"b" * 32])
    assert kept.secrets() == [b"a" * 32, b"b" * 32]
    lost = AnswerFile(tmp_path / "nowhere", AUDITOR.public, 10)
    lost.add(cases[0])
    lost.tell([b"a" * 32])
    assert list(lost.cases()) == lost.secrets() == []


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


def test_a_session_that_signed_two_stories_is_told_of_once_with_the_proof(tmp_path: Path) -> None:
    cluster = Cluster()
    desk = AuditOffice(tmp_path, AUDITOR, cluster.operator.public, auditor, lambda: redrawer_of((band(),)))

    def note(number: int) -> None:
        bundle = cluster.bundle(a_request(max_tokens=20 + number))
        desk.note([Note(f"r{number}", bundle.encode(), False, b"c" * 32)], b"", ())

    note(0)
    assert desk.news == []
    cluster.chains[1] = StatementChain(cluster.stages[1])
    note(1)
    note(2)
    (news,) = desk.news
    proof = Equivocation.decode(news.proof)
    assert news.node == proof.convicted() == cluster.nodes[1].key and desk.status()["convicted"] == 1
    (kept,) = (tmp_path / "proofs").iterdir()
    assert kept.read_bytes() == news.proof and kept.name == str(proof.cid)
    shown = CliRunner().invoke(app, ["audit", "proof", str(kept)])
    assert shown.exit_code == 0 and key_text(news.node) in shown.output
    kept.write_bytes(news.proof[:-1] + b"x")
    assert CliRunner().invoke(app, ["audit", "proof", str(kept)]).exit_code == 1
    assert CliRunner().invoke(app, ["audit", "proof", str(tmp_path / "none")]).exit_code == 2
    desk.close()
