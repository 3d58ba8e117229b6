"""Two neighbours that disagree: who is named, what convicts it, and that nobody else can be."""

from __future__ import annotations

import dataclasses
import random

import pytest

from serve_app.errors import ReceiptError
from serve_app.receipts.delivery import Delivery, DeliveryNote, Part, Vouched
from serve_app.receipts.identity import Session
from serve_app.receipts.transit import Opened, Received, Sent, Side, TransitProof, decide, twice
from shard_tools import canonical
from shard_tools.errors import FormatError, LlmdError, SignatureError
from shard_tools.signing import Envelope
from tests.serve_app.receipts.pipeline_of_three import MANIFEST, Cluster

CLUSTER = Cluster()
SENDER, RECEIVER, STRANGER = CLUSTER.stages
SEQ, EPOCH, STEP = 7, CLUSTER.epoch, 40
TRUE, FALSE = b"t" * 32, b"f" * 32


def part(root: bytes = TRUE, **changes: object) -> Part:
    return dataclasses.replace(Part(SEQ, b"r" * 32, 0, 20, True, root), **changes)  # type: ignore[arg-type]


def note(*parts: Part, by: Session = SENDER, step: int = STEP, stage: int = 0) -> DeliveryNote:
    """Beside two parts of other sequences."""
    others = [Part(n, b"o" * 32, 0, 3, False, bytes(32)) for n in (1, 2)]
    return DeliveryNote.of(by, MANIFEST, stage, step, [others[0], *parts, others[1]])


def opened(of: DeliveryNote, index: int = 1) -> Opened:
    return Opened(of.vouched, index, of.path(index))


def encoded(envelope: Envelope) -> bytes:
    return canonical.encode(envelope.to_value())


def sender(root: bytes = TRUE, *, by: Session = SENDER, step: int = STEP, told: bytes | None = None) -> Side:
    claim = encoded(Sent(MANIFEST, EPOCH, 0, step, part(root)).seal(by))
    return Side(0, SENDER.certificate, 20, told or root, claim)


def receiver(root: bytes = TRUE, shown: Opened | None = None, *, by: Session = RECEIVER) -> Side:
    claim = encoded(Received(MANIFEST, EPOCH, 1, part(root), shown or opened(note(part(root)))).seal(by))
    return Side(1, RECEIVER.certificate, 20, root, claim)


def test_a_receiver_that_claims_what_nobody_delivered_is_convicted_by_its_own_word() -> None:
    """Attack 8: it holds the delivery of the true rows, and no other."""
    blame = decide(SEQ, sender(), receiver(FALSE, opened(note(part()))))
    assert blame is not None and blame.stage == 1 and "did not deliver" in blame.why
    assert blame.proof is not None and blame.proof.convicted() == RECEIVER.node
    assert TransitProof.decode(blame.proof.encode()) == blame.proof
    assert "claims rows that were not delivered to it, as stage 1" in blame.proof.what


def test_a_sender_that_delivered_other_rows_than_it_says_is_convicted_by_both_its_words() -> None:
    blame = decide(SEQ, sender(FALSE), receiver())
    assert blame is not None and blame.stage == 0 and "signed two roots" in blame.why
    assert blame.proof is not None and blame.proof.convicted() == SENDER.node
    assert TransitProof.decode(blame.proof.encode()) == blame.proof


def test_who_signs_nothing_or_for_others_or_otherwise_than_it_told_is_named_and_nothing_is_proved() -> None:
    silent = dataclasses.replace(sender(FALSE), claim=b"")
    for side in (silent, sender(FALSE, by=STRANGER), sender(FALSE, told=b"x" * 32)):
        blame = decide(SEQ, side, receiver())
        assert blame is not None and (blame.stage, blame.proof) == (0, None)
    for got in (dataclasses.replace(receiver(FALSE), claim=b"junk"), receiver(FALSE, by=STRANGER)):
        blame = decide(SEQ, sender(), got)
        assert blame is not None and (blame.stage, blame.proof) == (1, None)
    assert decide(SEQ, silent, dataclasses.replace(receiver(), claim=b"")) is None


def test_a_delivery_that_the_receiver_made_itself_bears_nothing() -> None:
    """By a session of its own that it calls stage 0: the Head knows who stage 0 is; others would take its word."""
    friend = CLUSTER.session(1, "stage")
    blame = decide(SEQ, sender(), receiver(FALSE, opened(note(part(FALSE), by=friend))))
    assert blame is not None and (blame.stage, blame.proof) == (1, None)


def test_a_sender_that_names_another_step_than_it_delivered_with_is_named() -> None:
    blame = decide(SEQ, sender(FALSE, step=STEP + 1), receiver())
    assert blame is not None and (blame.stage, blame.proof) == (0, None)


def test_an_honest_sender_is_never_convicted_whatever_its_head_had_it_sign() -> None:
    """A number or a request that was given twice makes two truths, which are of two steps, or of two numbers."""
    sent = Sent(MANIFEST, EPOCH, 0, STEP, part()).seal(SENDER)
    for other in (note(part(FALSE), step=STEP - 9), note(part(FALSE, seq=SEQ + 1)), note(part(FALSE, last=False))):
        with pytest.raises(ReceiptError):
            TransitProof(SENDER.certificate, sent, FALSE, opened(other)).convicted()
    with pytest.raises(ReceiptError, match="nobody is convicted"):
        TransitProof(SENDER.certificate, sent, TRUE, opened(note(part()))).convicted()


def test_an_honest_receiver_is_never_convicted() -> None:
    honest = Received(MANIFEST, EPOCH, 1, part(), opened(note(part()))).seal(RECEIVER)
    with pytest.raises(ReceiptError, match="has signed for the rows"):
        TransitProof(RECEIVER.certificate, honest).convicted()
    lie = Received(MANIFEST, EPOCH, 1, part(FALSE), opened(note(part()))).seal(STRANGER)
    with pytest.raises(SignatureError):
        TransitProof(RECEIVER.certificate, lie).convicted()
    lent = dataclasses.replace(RECEIVER.certificate, key=STRANGER.node)
    with pytest.raises(LlmdError):
        TransitProof(lent, honest).convicted()


@pytest.mark.parametrize(
    "shown",
    [
        opened(note(part()), 0),
        opened(note(part(), stage=1)),
        opened(note(part(last=False))),
        opened(note(part(rows=19))),
        opened(note(part(), by=CLUSTER.session(0, "head"))),
        dataclasses.replace(opened(note(part())), path=()),
        dataclasses.replace(opened(note(part())), index=2),
        opened(dataclasses.replace(note(part()), vouched=Vouched(STRANGER.certificate, note(part()).vouched.delivery))),
    ],
    ids=["another part", "another boundary", "not the last", "fewer rows", "a head", "no path", "index", "no session"],
)
def test_what_bears_no_claim(shown: Opened) -> None:
    claim = Received(MANIFEST, EPOCH, 1, part(), shown).seal(RECEIVER)
    assert TransitProof(RECEIVER.certificate, claim).convicted() == RECEIVER.node


@pytest.mark.parametrize("says", ["true", "other", "nothing", "by another", "other step"])
@pytest.mark.parametrize("delivers", ["true", "other"])
@pytest.mark.parametrize("claims", ["true", "other", "third", "nothing", "own delivery"])
def test_whoever_lies_is_blamed_and_nobody_else(says: str, delivers: str, claims: str) -> None:
    """All that a sender may sign and a receiver may claim; the rows that were sent have the root TRUE."""
    roots = {"true": TRUE, "other": FALSE, "third": b"3" * 32}
    delivered, claimed = note(part(roots[delivers])), roots.get(claims, FALSE)
    shown = opened(note(part(claimed), by=CLUSTER.session(1, "stage")) if claims == "own delivery" else delivered)
    sent = {
        "nothing": dataclasses.replace(sender(), claim=b""),
        "by another": sender(by=STRANGER),
        "other step": sender(step=STEP + 1),
    }.get(says, sender(roots.get(says, TRUE)))
    got = dataclasses.replace(receiver(claimed), claim=b"") if claims == "nothing" else receiver(claimed, shown)
    honest_sender = says == delivers == "true"
    honest_receiver = claims == delivers == "true"  # one that got another delivery refuses, and claims nothing
    if sent.root == got.root:
        return  # the Head sees no difference
    blame = decide(SEQ, sent, got)
    if blame is None:
        assert says == claims == "nothing"
        return
    assert not (honest_sender if blame.stage == 0 else honest_receiver)
    if blame.proof is not None:
        assert blame.proof.convicted() == (SENDER, RECEIVER)[blame.stage].node


def test_two_deliveries_for_one_step_convict_whoever_signed_them() -> None:
    one, other = note(part()).vouched, note(part(FALSE)).vouched
    proof = twice(one, other)
    assert proof is not None and proof.convicted() == SENDER.node and proof == twice(other, one)
    assert TransitProof.decode(proof.encode()) == proof and "two deliveries" in proof.what
    assert twice(one, note(part()).vouched) is None  # the same again
    assert twice(one, note(part(FALSE), step=STEP + 1).vouched) is None
    assert twice(one, note(part(FALSE), by=RECEIVER).vouched) is None
    forged = dataclasses.replace(other, delivery=dataclasses.replace(other.delivery, signature=bytes(64)))
    assert twice(one, forged) is None


def test_a_signature_for_one_thing_is_none_for_another() -> None:
    """The payloads say much the same; the types do not."""
    sent = Sent(MANIFEST, EPOCH, 0, STEP, part(FALSE)).seal(SENDER)
    as_delivery = dataclasses.replace(note(part()).vouched.delivery, signature=sent.signature)
    with pytest.raises(SignatureError):
        Vouched(SENDER.certificate, as_delivery).opened()
    with pytest.raises(LlmdError):
        retyped = dataclasses.replace(sent, payload_type=note(part()).vouched.delivery.payload_type)
        TransitProof(SENDER.certificate, retyped).convicted()


def test_notes_and_what_is_in_them_read_as_they_were_written() -> None:
    one = note(part(), part(FALSE, seq=9, attempt=3, last=False))
    assert DeliveryNote.decode(one.encode()) == one
    assert [Part.decode(p).encode() for p in one.parts] == list(one.parts)
    _, said = one.vouched.opened()
    assert Delivery.decode(said.encode()) == said
    one.require_whole(said)
    for parts in (one.parts[:-1], one.parts[::-1], (*one.parts, one.parts[0])):
        with pytest.raises(ReceiptError, match="not over the parts"):
            dataclasses.replace(one, parts=parts).require_whole(said)
    with pytest.raises(FormatError):
        DeliveryNote.decode(one.encode() + b"\0")


def test_a_changed_byte_of_a_note_or_proof_is_refused() -> None:
    """Or says the very same, and convicts nobody else. Five thousand of each."""
    draw, one = random.Random(8), note(part())
    proofs = [
        TransitProof(RECEIVER.certificate, Received(MANIFEST, EPOCH, 1, part(FALSE), opened(one)).seal(RECEIVER)),
        TransitProof(SENDER.certificate, Sent(MANIFEST, EPOCH, 0, STEP, part(FALSE)).seal(SENDER), TRUE, opened(one)),
        twice(one.vouched, note(part(FALSE)).vouched),
    ]
    for i in range(5000):
        with pytest.raises(LlmdError):
            altered = DeliveryNote.decode(_altered(one.encode(), draw))
            altered.require_whole(altered.vouched.opened()[1])
        proof = proofs[i % 3]
        assert proof is not None
        with pytest.raises(LlmdError):
            TransitProof.decode(_altered(proof.encode(), draw)).convicted()


def _altered(data: bytes, draw: random.Random) -> bytes:
    while True:
        out = bytearray(data)
        at = draw.randrange(len(out))
        match draw.randrange(3):
            case 0:
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                del out[at : at + draw.randrange(1, 40)]
            case _:
                out[at:at] = draw.randbytes(draw.randrange(1, 40))
        if out != data:
            return bytes(out)
