"""An honest auditor meets canaries without knowing which they are; one that does not look misses them, provably."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audit.auditor import Auditor
from serve_app.audit.canaries import MISSES, AuditorStanding, Canaries, Trust, after_miss, canaries_of
from serve_app.audit.canary import MAX_MISS_BYTES, Canary, Logged, Miss, Outcome, batch_commitment
from serve_app.audit.desk import Drawn, Note
from serve_app.audit.office import AuditOffice
from serve_app.audit.redraw import Redrawer
from serve_app.audit.showing import shown_bytes
from serve_app.errors import AuditError, ReceiptError
from serve_app.local import Membership
from serve_app.messages.request import Sampling
from serve_app.receipts.identity import NodeIdentity
from serve_app.receipts.statement import envelope_cid
from serve_app.rehearsal import Rehearsed, rehearse
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, LlmdError, SignatureError
from shard_tools.signing import Envelope, Signer
from tests.serve_app.audit.lazy import LazyAuditor, LazyRedrawer
from tests.serve_app.audit.redrawn import band, redrawer_of
from tests.serve_app.audit.rehearsed import AUDITOR, OPTIONS, OTHER, STAGES, auditor, model, prompts

OPERATOR, MAKER = Signer.from_seed(b"o" * 32), Signer.from_seed(b"m" * 32)
NOTHING = Cid.of(Codec.RAW, b"nothing of the kind")


@dataclass(frozen=True)
class Planted:
    """One answer, the stage that is drawn of it, and what its maker knows. outcomes: by whether it is about draws."""

    one: Rehearsed
    stage: int
    outcomes: dict[bool, Outcome]

    @functools.cached_property
    def canaries(self) -> list[Canary]:
        last, found = STAGES - 1, []
        for draws, outcome in self.outcomes.items():
            stage = last if draws else self.stage
            found += canaries_of(self.one.statements[stage], self.one.records[stage], {draws: outcome})
        return found


@functools.cache
def membership() -> Membership:
    """The node that answers what people ask is the one whose sessions the maker holds."""
    return Membership.of(OPERATOR, NodeIdentity(Signer.from_seed(b"n" * 32)), STAGES, int(time.time()))


@functools.cache
def planted() -> tuple[Planted, ...]:
    """Rows of small weights in either stage, tokens of another seed, and honest ones."""

    def of(first: int, cheats: dict[int, str]) -> Rehearsed:
        asked, options = prompts(first, 1), {"stages": STAGES, "options": OPTIONS, "cheats": cheats}
        samplings = (Sampling(top_p_micro=900_000),)
        return rehearse(*model(), asked, tokens=14, samplings=samplings, membership=membership(), **options)[0]  # type: ignore[arg-type]

    return (
        Planted(of(100, {0: "int8"}), 0, {False: "fault"}),
        Planted(of(101, {1: "int8"}), 1, {False: "fault"}),
        Planted(of(102, {1: "other-seed"}), 1, {False: "honest", True: "fault"}),
        Planted(of(103, {}), 0, {False: "honest", True: "honest"}),
    )


class Bench:
    """An auditor's office and the maker of canaries, who speaks to it as a Head does."""

    def __init__(self, folder: Path, looks: Auditor, draws: Redrawer) -> None:
        self.office = AuditOffice(folder, AUDITOR, OPERATOR.public, lambda: looks, lambda: draws)
        self.maker = Canaries(AUDITOR.public, MAKER)
        self.misses: list[Miss] = []
        self.given: list[tuple[Note, Drawn, bytes]] = []

    def run(self, batch: tuple[Planted, ...], owner: str = "A") -> None:
        leaves = self.maker.commit([canary for one in batch for canary in one.canaries])
        commitment = batch_commitment(leaves)
        self.office.note([], commitment, ())
        for i, one in enumerate(batch):
            note = Note(f"{owner}{i}", one.one.bundle, True, b"c" * 32)
            drawn = Drawn(note.id, note.cid, one.stage, True)
            self.office.note([note], b"", ())
            for said in self.office.begin(drawn):
                session = membership().chains[said.stage].session
                record = one.one.records[said.stage]
                shown = shown_bytes(said.request_hash, said.attempt, said.stage, record, session)
                self.given.append((note, drawn, shown))
                self.office.judge(drawn, said.stage, shown)
        for news in self.office.news:
            verdict = Envelope.from_value(canonical.decode(news.verdict, max_bytes=1 << 16), "verdict", 1 << 16)
            if self.maker.judged(verdict) == "missed":
                assert self.maker.is_one(verdict)
                said: Any = self.office.prove([Cid.of(Codec.RAW, commitment), envelope_cid(verdict)])
                sealed = Envelope.from_value(canonical.decode(said["head"], max_bytes=1 << 10), "head", 1 << 10)
                miss = self.maker.proved(verdict, sealed, said["proofs"], owner)
                self.misses.append(Miss.open(miss, frozenset((MAKER.public,))))
        self.office.news.clear()


def bench(folder: Path, says: str | None = None) -> Bench:
    if says is None:
        return Bench(folder, auditor(), redrawer_of((band(),)))
    wrong: Any = ("pass", "pass") if says == "pass" else ("fault", "sampler")
    return Bench(folder, LazyAuditor(wrong[0]), LazyRedrawer(wrong[1]))


@functools.cache
def a_miss(folder: Path) -> Miss:
    own = bench(folder, "pass")
    own.run(planted()[:1])
    (miss,) = own.misses
    return miss


@pytest.fixture(scope="module")
def miss(tmp_path_factory: pytest.TempPathFactory) -> Miss:
    return a_miss(tmp_path_factory.mktemp("miss"))


def test_an_honest_auditor_meets_every_canary(tmp_path: Path) -> None:
    own = bench(tmp_path)
    own.run(planted())
    assert own.maker.standing == AuditorStanding(met=6) and own.misses == []
    own.office.close()


@pytest.mark.parametrize(("says", "missed"), [("pass", 3), ("fault", 3)])
def test_one_that_signs_the_same_of_everything_is_found_with_proofs(tmp_path: Path, says: str, missed: int) -> None:
    """Who always passes misses what was planted, who always accuses what was honest; each proof stands by itself."""
    own = bench(tmp_path, says)
    own.run(planted())
    assert (own.maker.standing.met, len(own.misses)) == (6 - missed, missed)
    assert {miss.convicted() for miss in own.misses} == {AUDITOR.public}
    assert own.maker.standing.trust is Trust.DOUBTED  # one owner's canaries, however many
    own.office.close()


def test_two_owners_put_an_auditor_out_and_one_never_does(miss: Miss) -> None:
    other = dataclasses.replace(miss, canary=dataclasses.replace(miss.canary, salt=bytes(32)))
    standing = AuditorStanding()
    for proof, owner, trust in (
        (miss, "A", Trust.TRUSTED),
        (miss, "A", Trust.TRUSTED),  # the same again is no second one
        (other, "A", Trust.DOUBTED),
        (miss, "B", Trust.DOUBTED),
        (other, "B", Trust.OUT),
    ):
        standing = after_miss(standing, proof, owner)
        assert standing.trust is trust
    assert MISSES == 2


def test_nothing_that_an_auditor_is_given_tells_a_canary_from_another_answer(tmp_path: Path) -> None:
    """Same node, model, profile and sessions; same messages, of the same sizes and fields; one more in the log."""
    people = (Planted(rehearsed_for_people(), 0, {}), Planted(rehearsed_for_people(111), 1, {}))
    own = bench(tmp_path)
    leaves = own.maker.commit([canary for one in planted() for canary in one.canaries])
    assert len(batch_commitment(leaves)) == 32  # as those to draws, in the same field of the same message
    kinds = []
    for one in (planted()[0], planted()[1], *people):
        checked = one.one.receipt
        assert Note("r", one.one.bundle, True, b"c" * 32).cid == checked.cid
        shapes = [
            (s.node, s.epoch, s.manifest, s.profile, s.shards, s.n_rows, len(e.payload), e.key)
            for s, e in zip(checked.statements, one.one.statements, strict=True)
        ]
        sizes = [(len(r.received), len(r.sent)) for r in one.one.records]
        kinds.append((shapes, sizes, checked.registry, checked.receipt.node, checked.receipt.sampling.top_p_micro))
    assert all(kind == kinds[0] for kind in kinds)
    seqs = [[s.seq for s in one.one.receipt.statements] for one in (*planted(), *people)]
    assert all(before < after for before, after in itertools.pairwise(seqs))  # one chain, without a seam
    own.office.close()


@functools.cache
def rehearsed_for_people(first: int = 110) -> Rehearsed:
    planted()
    return rehearse(
        *model(),
        prompts(first, 1),
        stages=STAGES,
        options=OPTIONS,
        tokens=14,
        samplings=(Sampling(top_p_micro=900_000),),
        membership=membership(),
    )[0]


def test_a_maker_who_lies_about_the_outcome_is_seen_through_by_computing_again(tmp_path: Path) -> None:
    """It calls honest rows a fault. The proof names the rows; they pass; and one owner puts nobody out."""
    own, truth = bench(tmp_path), planted()[3]
    own.run((Planted(truth.one, 0, {False: "fault"}),))
    (miss,) = own.misses
    assert miss.convicted() == AUDITOR.public and own.maker.standing.trust is Trust.TRUSTED
    (lie,) = canaries_of(truth.one.statements[0], truth.one.records[0], {False: "fault"})
    assert lie.shown == miss.canary.shown  # these are the rows
    again = auditor(OTHER).audit(truth.one.statements[0], truth.one.records[0], OTHER.public, 0)
    assert again.verdict.finding == "pass"
    own.office.close()


def test_what_does_not_prove_a_miss(miss: Miss) -> None:
    """An outcome that was made to fit afterwards, another's verdict, a log that was not shown, a changed opening."""
    canary = miss.canary
    for changes, error in (
        ({"committed": miss.judged}, ReceiptError),
        ({"committed": miss.judged, "judged": miss.committed}, ReceiptError),
        ({"leaves": (bytes(32), *miss.leaves)}, ReceiptError),
        ({"leaves": (bytes(32),)}, AuditError),
        ({"canary": dataclasses.replace(canary, outcome="honest")}, AuditError),
        ({"canary": dataclasses.replace(canary, draws=True)}, AuditError),
        ({"canary": dataclasses.replace(canary, salt=bytes(32))}, AuditError),
        ({"verdict": dataclasses.replace(miss.verdict, signature=bytes(64))}, SignatureError),
        ({"head": dataclasses.replace(miss.head, signature=bytes(64))}, SignatureError),
    ):
        with pytest.raises(error):
            dataclasses.replace(miss, **changes).convicted()  # type: ignore[arg-type]
    with pytest.raises(SignatureError):
        Miss.open(miss.seal(MAKER), frozenset((OTHER.public,)))


def test_a_commitment_that_came_after_the_verdict_proves_nothing(tmp_path: Path) -> None:
    own, truth = bench(tmp_path), planted()[3]
    late = Planted(truth.one, 0, {False: "fault"})
    note = Note("r", truth.one.bundle, True, b"c" * 32)
    own.office.note([note], b"", ())
    drawn = Drawn(note.id, note.cid, 0, True)
    said = own.office.begin(drawn)[0]
    session = membership().chains[0].session
    own.office.judge(drawn, 0, shown_bytes(said.request_hash, 0, 0, truth.one.records[0], session))
    commitment = batch_commitment(own.maker.commit(late.canaries))
    own.office.note([], commitment, ())
    (news,) = own.office.news
    verdict = Envelope.from_value(canonical.decode(news.verdict, max_bytes=1 << 16), "verdict", 1 << 16)
    assert own.maker.judged(verdict) == "missed"
    proof: Any = own.office.prove([Cid.of(Codec.RAW, commitment), envelope_cid(verdict)])
    sealed = Envelope.from_value(canonical.decode(proof["head"], max_bytes=1 << 10), "head", 1 << 10)
    with pytest.raises(AuditError, match="made to fit"):
        own.maker.proved(verdict, sealed, proof["proofs"], "A")
    assert own.office.prove([NOTHING])["proofs"] == [None]
    own.office.close()


def test_an_answer_without_a_finding_neither_meets_nor_misses() -> None:
    for outcome in ("honest", "fault"):
        canary = Canary(NOTHING, False, outcome, bytes(32), bytes(32))  # type: ignore[arg-type]
        assert [canary.answered(f) for f in ("suspect", "uncalibrated")] == ["unanswered"] * 2
        assert canary.answered("pass") != canary.answered("fault")


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, at: int, to: int
) -> None:
    miss = a_miss(tmp_path_factory.getbasetemp() / "canary-miss")
    data = bytearray(miss.encode())
    data[at % len(data)] = to
    try:
        assert Miss.decode(bytes(data)).convicted() == AUDITOR.public and data == miss.encode()
    except LlmdError:
        pass
    assert Miss.decode(miss.encode()) == miss and len(miss.encode()) < MAX_MISS_BYTES
    with pytest.raises(FormatError):
        Logged.from_value({"index": 0, "path": [b"short"]})
