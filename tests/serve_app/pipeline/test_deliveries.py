"""Stages that sign for rows on their way: honest ones are answered as ever, and of two that differ one is named."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from serve_app.errors import ProtocolError
from serve_app.local import LocalPipeline
from serve_app.messages.request import FailedEvent, FinishedEvent, Sampling
from serve_app.messages.step import Refused, Reply, Roots, StepPlan
from serve_app.pipeline import deliveries
from serve_app.pipeline.deliveries import MAX_LATE, Covered, Deliveries, DeliveryTerms
from serve_app.receipts.check import check
from serve_app.receipts.delivery import DeliveryNote, Vouched, is_delivery_note
from serve_app.receipts.evidence import ERROR_TYPE, Evidence, shown_in
from serve_app.receipts.identity import NodeIdentity, Session
from serve_app.receipts.transit import Received, Sent, TransitProof
from shard_tools import canonical
from shard_tools.errors import FormatError
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope, Signer
from shard_tools.store.memory import MemoryStore
from tests.serve_app.pipeline.test_pipeline import collect, request, run
from tests.serve_app.receipts.pipeline_of_three import MANIFEST, Cluster

Tiny = tuple[MemoryStore, Manifest]
CLUSTER = Cluster()


def signed(tiny: Tiny, stages: int, work: Callable[[LocalPipeline], Any], **limits: int) -> None:
    run(tiny, stages, work, **{"deliveries": True} | limits)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"page_size": 16, "prefix_cache": True},
        {"speculate": 4},
        {"n_pages": 14},
        {"page_size": 16, "prefix_cache": True, "speculate": 8, "n_pages": 6},
    ],
    ids=["plain", "shared beginnings", "guesses", "preempted", "all of it"],
)
def test_honest_stages_are_answered_with_receipts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """Every sequence is delivered: twice the same beginnings, void guesses, several attempts, an end at a stop."""
    monkeypatch.setattr("serve_app.scheduling.speculation._START", 1.0)
    monkeypatch.setattr("serve_app.scheduling.speculation._STEP", 0.0)
    monkeypatch.setattr("tests.serve_app.pipeline.test_pipeline.PAGES", limits.get("n_pages", 64))

    async def work(pipeline: LocalPipeline) -> None:
        for _ in range(2):
            asked = [
                request(tiny[1], "r" * (1 + i), prompt=5 + 9 * i, tokens=24, sampling=Sampling(10**5 * i))
                for i in range(4)
            ]
            for r, (tokens, end) in zip(
                asked, await asyncio.gather(*(collect(pipeline, r) for r in asked)), strict=True
            ):
                assert isinstance(end, FinishedEvent), end
                checked = check(end.receipt, pipeline.operator.public, now_s=int(time.time()))
                assert list(checked.receipt.out_ids) == tokens and len(tokens) == r.max_tokens
        facts = pipeline.head.status()
        if "n_pages" in limits:
            assert facts["preemptions"]
        if "prefix_cache" in limits:
            assert facts["cached_tokens"]
        if "speculate" in limits:
            assert facts["guesses"] and facts["guesses"] != facts["guesses_right"]

    signed(tiny, 3, work, **limits)


class Altering:
    """An edge that does something to each message of a kind."""

    def __init__(self, beneath: Any, rows: Callable[[bytes], bytes] | None = None, notes: Any = None) -> None:
        self.beneath, self._rows, self._notes = beneath, rows, notes

    def send(self, message: bytes, rows: bytes | memoryview = b"") -> None:
        message = b"".join((message, rows))
        if is_delivery_note(message):
            for note in [message] if self._notes is None else self._notes(message):
                self.beneath.send(note)
            return
        plan, payload = StepPlan.decode(message)
        if plan.rows and self._rows is not None:
            message = plan.encode(self._rows(bytes(payload)))
        self.beneath.send(message)

    def close(self) -> None: ...


def turned(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


async def refused(pipeline: LocalPipeline, manifest: Manifest, name: str = "r") -> Evidence:
    """What the client is shown; the error is the Head's, and says the same."""
    _, end = await collect(pipeline, request(manifest, name))
    assert isinstance(end, FailedEvent) and end.kind == "integrity", end
    envelope = Envelope.from_value(canonical.decode(end.evidence, max_bytes=1 << 20), "error", 1 << 20)
    found = Evidence.decode(envelope.open(ERROR_TYPE, frozenset([envelope.key]), "the head"))
    assert found.error == end.message
    while pipeline.head.status()["running"] or pipeline.head.status()["steps_in_flight"]:
        await asyncio.sleep(0.01)  # a step of it was on its way
    if found.proof:
        assert shown_in(end.evidence) == found.proof == pipeline.head.proofs[-1]
    else:
        with pytest.raises(FormatError, match="no proof, only the Head's word"):
            shown_in(end.evidence)
        assert not pipeline.head.proofs
    return found


def test_rows_altered_on_their_way_are_refused_before_anything_is_signed_for_them(tiny: Tiny) -> None:
    """The sender is named by its receiver's word; what it signed is shown, which is over the rows it meant to send."""

    async def work(pipeline: LocalPipeline) -> None:
        sound = pipeline.stages[0]._next
        pipeline.stages[0]._next = Altering(sound, rows=turned)
        found = await refused(pipeline, tiny[1])
        assert "stage 1 refuses the rows of stage 0: it signed for other rows than came" in found.error
        shown = canonical.decode(found.delivery, max_bytes=10_000)
        assert isinstance(shown, dict)
        with canonical.Fields(shown, "shown") as f:
            terms, said = Vouched.take(f).opened()
        assert terms.node == pipeline.node.key and said.stage == 0 and not found.proof
        assert [stage.witness._chain._seq for stage in pipeline.stages] == [0, 0]
        pipeline.stages[0]._next = sound
        _, end = await collect(pipeline, request(tiny[1], "again"))
        assert isinstance(end, FinishedEvent)

    signed(tiny, 2, work)


@pytest.mark.parametrize("cut", ["all", "one"])
def test_rows_that_nobody_signs_for_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """Some steps later while the request runs, some seconds later at its end."""
    monkeypatch.setattr(deliveries, "LATE_S", 2.0)
    monkeypatch.setattr(deliveries, "MAX_LATE", 6)
    seen: list[bytes] = []

    def drop(note: bytes) -> list[bytes]:
        seen.append(note)
        return [] if cut == "all" or len(seen) == 2 else [note]

    async def work(pipeline: LocalPipeline) -> None:
        pipeline.stages[0]._next = Altering(pipeline.stages[0]._next, notes=drop)
        found = await refused(pipeline, tiny[1])
        assert "stage 1 refuses the rows of stage 0: it did not sign for step" in found.error
        assert not found.delivery and not found.proof

    signed(tiny, 2, work)


def stranger() -> Session:
    return NodeIdentity(Signer.fresh()).open_session("stage", 1, int(time.time()), 3600)


def resigned(note: bytes) -> list[bytes]:
    """By a node that is no neighbour, for the same rows."""
    one, other = DeliveryNote.decode(note), stranger()
    delivery = other.seal(one.vouched.delivery.payload_type, one.vouched.delivery.payload)
    return [dataclasses.replace(one, vouched=Vouched(other.certificate, delivery)).encode()]


def lacking(note: bytes) -> list[bytes]:
    one = DeliveryNote.decode(note)
    return [dataclasses.replace(one, parts=(one.parts[0], one.parts[0])).encode()]


@pytest.mark.parametrize(
    ("notes", "match"),
    [
        (resigned, "which is not stage 1"),
        (lacking, "not over the parts"),
        (lambda note: [note[:-1]], "it signed wrongly"),
        (lambda note: [note[:40] + turned(note[40:])], "it signed wrongly"),
    ],
    ids=["stranger", "parts", "short", "bit"],
)
def test_signatures_that_do_not_hold_are_refused(
    tiny: Tiny, notes: Callable[[bytes], Sequence[bytes]], match: str
) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        pipeline.stages[1]._next = Altering(pipeline.stages[1]._next, notes=notes)
        found = await refused(pipeline, tiny[1])
        assert "stage 2 refuses the rows of stage 1: it signed wrongly" in found.error and match in found.error

    signed(tiny, 3, work)


def lie(pipeline: LocalPipeline, stage: int, alter: Callable[[Roots, Session], Roots]) -> None:
    """This stage tells the Head something else than it hashed, and signs for that with its own key."""
    of = pipeline.stages[stage].deliveries
    assert of is not None
    honest, session = of._reply, pipeline.stages[stage].witness._chain.session

    def tell(reply: Reply) -> None:
        honest(alter(reply, session) if isinstance(reply, Roots) else reply)

    of._reply = tell


def claims_other_rows_received(told: Roots, session: Session) -> Roots:
    said = Received.decode(_payload(told.received))
    part = dataclasses.replace(said.part, root=turned(said.part.root))
    claim = dataclasses.replace(said, part=part).seal(session)
    return dataclasses.replace(told, in_root=part.root, received=canonical.encode(claim.to_value()))


def claims_other_rows_sent(told: Roots, session: Session) -> Roots:
    said = Sent.decode(_payload(told.sent))
    part = dataclasses.replace(said.part, root=turned(said.part.root))
    claim = dataclasses.replace(said, part=part).seal(session)
    return dataclasses.replace(told, out_root=part.root, sent=canonical.encode(claim.to_value()))


def _payload(encoded: bytes) -> bytes:
    return Envelope.from_value(canonical.decode(encoded, max_bytes=1 << 16), "claim", 1 << 16).payload


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (
            claims_other_rows_received,
            "stage 1 received other rows than stage 0 sent; stage 1 is at fault: it claims rows",
        ),
        (
            claims_other_rows_sent,
            "stage 2 received other rows than stage 1 sent; stage 1 is at fault: it signed two roots",
        ),
    ],
)
def test_one_that_says_other_than_was_delivered_is_convicted(
    tiny: Tiny, told: Callable[[Roots, Session], Roots], why: str
) -> None:
    """As the receiver, of its input; as the sender, of its output."""

    async def work(pipeline: LocalPipeline) -> None:
        lie(pipeline, 1, told)
        found = await refused(pipeline, tiny[1])
        assert why in found.error
        proof = TransitProof.decode(found.proof)
        assert proof.convicted() == pipeline.node.key
        assert proof.certificate == pipeline.stages[1].witness._chain.session.certificate

    signed(tiny, 3, work)


def test_one_that_lies_and_signs_nothing_is_named_by_the_heads_word(tiny: Tiny) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        lie(pipeline, 1, lambda told, _: dataclasses.replace(told, in_root=turned(told.in_root), received=b""))
        found = await refused(pipeline, tiny[1])
        assert "stage 1 is at fault: it did not sign" in found.error and not found.proof

    signed(tiny, 2, work)


# One stage by itself: stage 1 of three, between real keys.


class Heard:
    """What a stage tells its Head, and what it hands on."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.notes: list[bytes] = []
        terms = DeliveryTerms(CLUSTER.nodes[0].key, True)
        session = CLUSTER.stages[1]
        self.of = Deliveries(terms, MANIFEST, 1, session, self.replies.append, self.notes.append)


def covered(seq: int = 1, rows: int = 5, *, last: bool = False, root: bytes = b"i" * 32) -> Covered:
    return Covered(seq, b"r" * 32, 0, rows, last, root, b"o" * 32)


def note(step: int, *said: Covered, stage: int = 0, by: int = 0) -> bytes:
    parts = [one.part(one.in_root) for one in said]
    return DeliveryNote.of(CLUSTER.stages[by], MANIFEST, stage, step, parts).encode()


def test_notes_may_come_before_or_behind_the_hashes_of_their_steps() -> None:
    heard = Heard()
    heard.of.heard(note(1, covered()))
    heard.of.heard(note(2, covered(rows=6, last=True), covered(2)))
    assert heard.of.look() == [] and not heard.replies
    assert heard.of.stepped(1, [covered()]) == [] and not heard.replies
    assert heard.of.stepped(2, [covered(2), covered(rows=6, last=True)]) == []
    (told,) = heard.replies
    assert isinstance(told, Roots) and told.seq == 1 and told.rows == 6 and told.sent and told.received
    assert heard.of.stepped(3, [covered(2, last=True)]) == [] and len(heard.replies) == 1
    heard.of.heard(note(3, covered(2, last=True)))
    assert heard.of.look() == [] and len(heard.replies) == 2 and len(heard.notes) == 3


def test_a_note_of_a_step_that_failed_here_is_not_kept() -> None:
    heard = Heard()
    assert heard.of.stepped(5, []) == []
    heard.of.heard(note(5, covered()))
    assert heard.of.look() == [] and not heard.of._early and not heard.replies


def test_only_the_sequence_that_differs_is_refused() -> None:
    heard = Heard()
    heard.of.heard(note(1, covered(1), covered(2, root=b"x" * 32), covered(3, last=True)))
    assert heard.of.stepped(1, [covered(1), covered(2), covered(3, last=True)]) == [2]
    refused, told = heard.replies
    assert isinstance(refused, Refused) and refused.seq == 2 and refused.delivery
    assert isinstance(told, Roots) and told.seq == 3


def test_two_notes_for_one_step_convict_their_sender() -> None:
    heard = Heard()
    heard.of.heard(note(1, covered()))
    assert heard.of.stepped(1, [covered()]) == []
    heard.of.heard(note(1, covered(root=b"x" * 32)))
    assert heard.of.stepped(2, [covered(rows=6)]) == [1]
    refused = heard.replies[-1]
    assert isinstance(refused, Refused) and "two deliveries for step 1" in refused.message
    assert TransitProof.decode(refused.proof).convicted() == CLUSTER.nodes[0].key


def test_the_same_note_again_is_no_second_one() -> None:
    heard = Heard()
    for _ in range(3):
        heard.of.heard(note(1, covered()))
    assert heard.of.stepped(1, [covered()]) == [] and not heard.replies


@pytest.mark.parametrize(
    "wrong",
    [note(1, covered(), stage=1), note(1, covered(), by=1), b"", note(1, covered())[:-1] + b"\0"],
    ids=["another boundary", "its own", "nothing", "a bit"],
)
def test_what_is_no_note_of_its_neighbour_is_refused(wrong: bytes) -> None:
    heard = Heard()
    heard.of.heard(wrong)
    assert heard.of.stepped(1, [covered()]) == [1]
    assert isinstance(heard.replies[0], Refused) and "it signed wrongly" in heard.replies[0].message


def test_nothing_is_awaited_for_ever() -> None:
    """And little is kept."""
    heard = Heard()
    gone = [heard.of.stepped(step, [covered(rows=1 + step)]) for step in range(MAX_LATE + 3)]
    assert [seqs for seqs in gone if seqs] == [[1]] * 3
    for step in range(1000, 3000):
        heard.of.heard(note(step, covered()))
        heard.of.look()
    assert len(heard.of._early) <= 256 and len(heard.of._kept) <= 64


def test_no_head_can_have_a_stage_sign_two_stories() -> None:
    heard = Heard()
    heard.of.stepped(7, [covered()])
    for step, again in ((7, [covered()]), (6, [covered()]), (8, [covered(), covered(rows=9)])):
        with pytest.raises(ProtocolError, match="is not signed for"):
            heard.of.stepped(step, again)
    assert len(heard.notes) == 1


def test_a_note_that_nobody_asked_for_is_an_error(tiny: Tiny) -> None:
    first = Deliveries(DeliveryTerms(None, True), MANIFEST, 0, CLUSTER.stages[0], print, print)
    with pytest.raises(ProtocolError, match="nobody is to sign"):
        first.heard(note(1, covered()))
