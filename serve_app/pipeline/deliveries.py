"""One stage's part in delivery signatures: signs for what it sent, asks for the signature over what it received.

The signature over the rows of a step follows them along their edge, some steps later: the sender hashes behind its
work, and so does the receiver. What a sequence came to is told to the Head only once its sender has signed for it, and
a sequence whose rows nobody signed for, or other rows than came, is refused: nothing of it is told or signed here.
Used by the witness's thread alone, but for `heard`.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from serve_app.errors import PipelineError, ProtocolError, ReceiptError
from serve_app.messages.step import DRAW_EACH, Refused, Reply, Roots, StepPlan
from serve_app.receipts.delivery import DeliveryNote, Part, Vouched, certified
from serve_app.receipts.identity import Certificate, Session
from serve_app.receipts.rows import PAGE_ROWS, RowTree
from serve_app.receipts.transit import Opened, Received, Sent, twice
from shard_tools import canonical
from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope, PublicKey, key_text

_log = logging.getLogger(__name__)
# Steps that the receiver has hashed and no signature has come for. A sender signs at most 8 steps late: one in work and
# two waiting in its witness, and its own launched ones. Notes and steps keep their order, so this takes no luck.
MAX_LATE = 32
LATE_S = 30.0  # nothing else runs behind the last step of a sequence; a loaded machine hashes a step within a second
LOOK_EVERY_S = 1.0
_MAX_EARLY = 256  # notes of steps that were not hashed here yet: an edge and a stage hold far fewer
Leaves = npt.NDArray[np.uint8]
T = TypeVar("T")
_MAX_KEPT = 64  # of the latest steps, to know a second note by


@dataclass(frozen=True, slots=True)
class DeliveryTerms:
    """Which of a stage's two edges to its neighbours go with signatures."""

    sender: PublicKey | None  # the node that must sign for what comes in; None: nobody does
    sends: bool  # whether this stage signs for what it hands on

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.sends or self.sender is not None


@dataclass(frozen=True, slots=True)
class Covered:
    """The rows of a sequence that a step has brought it to."""

    seq: int
    request_hash: bytes
    attempt: int
    rows: int
    last: bool
    in_root: bytes
    out_root: bytes

    def part(self, root: bytes) -> Part:
        """As it is delivered."""
        return Part(self.seq, self.request_hash, self.attempt, self.rows, self.last, root)


class Grown(Protocol):
    """What a witness has of an open sequence."""

    request_hash: bytes
    attempt: int
    inlet: RowTree
    outlet: RowTree
    slot: int  # of its last leaves
    last: tuple[bytes, bytes] | None  # roots of the last full page, if it is in no tree yet
    lost: bool


def covered_by(plan: StepPlan, opened: Mapping[int, Grown], latest: Leaves, terms: DeliveryTerms) -> list[Covered]:
    """What the sequences of a step have come to; guesses may turn out void, so none of them counts yet.

    latest: the last leaves, [slot, in or out, position % ring, 32]. A root that nobody signs for is left out.
    """
    covered: list[Covered] = []
    if not terms.any:
        return covered
    for seq, start, count, sample in plan.spans[["seq", "start", "count", "sample"]].tolist():
        own = opened.get(seq)
        if own is None or own.lost:
            continue
        rows, begun = start + (1 if sample == DRAW_EACH else count), len(own.inlet)
        pages: tuple[bytes | None, bytes | None] = (None, None)
        if own.last is not None and rows >= begun + PAGE_ROWS:
            pages, begun = own.last, begun + PAGE_ROWS
        leaves_in, leaves_out = latest[own.slot][:, np.arange(begun, rows) % latest.shape[2]]
        in_root = own.inlet.root_behind(pages[0], leaves_in.tobytes()) if terms.sender is not None else b""
        out_root = own.outlet.root_behind(pages[1], leaves_out.tobytes()) if terms.sends else b""
        covered.append(Covered(seq, own.request_hash, own.attempt, rows, False, in_root, out_root))
    return covered


def ended(seq: int, trees: Grown) -> Covered:
    """What a sequence came to whose trees are complete."""
    roots = trees.inlet.root(), trees.outlet.root()
    return Covered(seq, trees.request_hash, trees.attempt, len(trees.inlet), True, *roots)


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A step that was hashed here, and no signature has come for."""

    covered: Sequence[Covered]
    sent: Mapping[int, bytes]  # by sequence: what this stage says that it sent, of those that end
    since: float


class Deliveries:
    """Of one Stage, in one epoch."""

    def __init__(
        self,
        terms: DeliveryTerms,
        manifest: Cid,
        stage: int,
        session: Session,
        reply: Callable[[Reply], None],
        hand_on: Callable[[bytes], None],
    ) -> None:
        """hand_on: puts a note behind what was sent to the next stage. Raises PipelineError if that is gone."""
        self.terms, self._manifest, self._stage, self._session = terms, manifest, stage, session
        self._reply, self._hand_on = reply, hand_on
        self._signed = -1  # the last step
        self.signed = self.checked = 0  # steps, for `llmd status`
        self._inbox: deque[bytes] = deque(maxlen=_MAX_EARLY)
        self._sender: tuple[Envelope, Certificate] | None = None  # its session, once that was looked at
        self._early: OrderedDict[int, DeliveryNote] = OrderedDict()
        self._awaited: OrderedDict[int, _Awaited] = OrderedDict()
        self._kept: OrderedDict[int, Vouched] = OrderedDict()
        self._broken: tuple[str, bytes, bytes] | None = None  # why nothing of this sender counts; a delivery; a proof
        self._refused: list[int] = []
        self._seen = self._heard = -1  # the last step that was hashed here, and that was signed for

    @classmethod
    def nowhere(cls, manifest: Cid, stage: int, session: Session, reply: Callable[[Reply], None]) -> Deliveries:
        """Where nobody signs: what a sequence came to is told as soon as it ends."""

        def hand_on(_: bytes) -> None:
            raise AssertionError("nothing is signed for")

        return cls(DeliveryTerms(None, False), manifest, stage, session, reply, hand_on)

    def next_of(self, work: queue.Queue[T], look: T) -> T:
        """What the witness is to do next: a step, or from time to time to `look`, where something is awaited."""
        try:
            return work.get(timeout=LOOK_EVERY_S if self._awaited else None)
        except queue.Empty:
            return look

    def heard(self, message: bytes) -> None:
        """A note has come. Any thread; `look` takes it in. Raises ProtocolError if none was asked for."""
        if self.terms.sender is None:
            raise ProtocolError("a delivery note came, where nobody is to sign for what comes in")
        self._inbox.append(message)

    def stepped(self, step: int, covered: Sequence[Covered]) -> list[int]:
        """A step was hashed, and these sequences had rows in it or end in it.

        Returns those that are refused since it was asked last. Raises ProtocolError for what nobody can sign.
        """
        sent = self._sign(step, covered) if self.terms.sends and covered else {}
        if self.terms.sender is None:
            for one in covered:
                self._tell(one, sent, b"")
            return []
        self._seen = max(self._seen, step)
        if covered:
            self._awaited[step] = _Awaited(covered, sent, time.monotonic())
        return self.look()

    def look(self) -> list[int]:
        """Take in what has come, and ask for what has not. Returns the sequences that are refused."""
        while self._inbox and self._broken is None:
            self._take(self._inbox.popleft())
        for step in [step for step in self._awaited if step in self._early]:
            self._compare(self._awaited.pop(step), self._early.pop(step))
        now = time.monotonic()
        while self._awaited:
            step, awaited = next(iter(self._awaited.items()))
            in_time = len(self._awaited) <= MAX_LATE and now - awaited.since < LATE_S
            if self._broken is None and in_time and step > self._heard:  # notes keep the order of their steps
                break
            why, delivery, proof = self._broken or (f"it did not sign for step {step}", b"", b"")
            del self._awaited[step]
            for one in awaited.covered:
                self._refuse(one, why, delivery, proof)
        refused, self._refused = self._refused, []
        return refused

    def _sign(self, step: int, covered: Sequence[Covered]) -> dict[int, bytes]:
        """Send the note of this step. Returns what is to be told of the sequences that end."""
        # Two of one step, or of one sequence in a step, would convict this stage, whoever had it sign them.
        if step <= self._signed or len({one.seq for one in covered}) < len(covered):
            raise ProtocolError(f"step {step} behind step {self._signed}, or with a sequence twice, is not signed for")
        self._signed, self.signed = step, self.signed + 1
        parts = [one.part(one.out_root) for one in covered]
        note = DeliveryNote.of(self._session, self._manifest, self._stage, step, parts)
        try:
            self._hand_on(note.encode())
        except PipelineError as e:
            _log.warning("stage %d cannot sign to the next: %s", self._stage, e)
        epoch = self._session.epoch
        claims = (Sent(self._manifest, epoch, self._stage, step, part) for part in parts if part.last)
        return {claim.part.seq: _encoded(claim.seal(self._session)) for claim in claims}

    def _take(self, message: bytes) -> None:
        note = said = None
        try:
            note = DeliveryNote.decode(message)
            said = note.vouched.said(self._session_of(note.vouched))
            if (said.manifest, said.epoch, said.stage) != (self._manifest, self._session.epoch, self._stage - 1):
                raise ReceiptError(f"delivery: it is of stage {said.stage} in epoch {said.epoch}, or of another model")
            note.require_whole(said)
        except LlmdError as e:
            shown = b"" if note is None else canonical.encode(note.vouched.fields())
            self._broken = f"it signed wrongly: {e}", shown, b""
            return
        before = self._kept.get(said.step)
        if before is not None:
            proof = twice(before, note.vouched)
            if proof is not None:
                self._broken = f"it signed two deliveries for step {said.step}", b"", proof.encode()
            return
        self._heard = max(self._heard, said.step)
        self._kept[said.step] = note.vouched
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        if said.step > self._seen or said.step in self._awaited:  # else that step failed here
            self._early[said.step] = note
            if len(self._early) > _MAX_EARLY:
                self._early.popitem(last=False)

    def _session_of(self, vouched: Vouched) -> Certificate:
        """Whose words these are, if they are the neighbour's. Raises LlmdError."""
        if self._sender is None or self._sender[0] != vouched.certificate:
            terms = certified(vouched.certificate)
            if terms.node != self.terms.sender:
                raise ReceiptError(
                    f"certificate: it is by {key_text(terms.node)}, which is not stage {self._stage - 1}"
                )
            self._sender = vouched.certificate, terms
        return self._sender[1]

    def _compare(self, awaited: _Awaited, note: DeliveryNote) -> None:
        self.checked += 1
        places = {part: i for i, part in enumerate(note.parts)}
        for one in awaited.covered:
            part = one.part(one.in_root)
            at = places.get(part.encode())
            if at is None:
                shown = canonical.encode(note.vouched.fields())
                self._refuse(one, f"it signed for other rows than came, up to row {one.rows}", shown, b"")
            elif one.last:
                opened = Opened(note.vouched, at, note.path(at))
                claim = Received(self._manifest, self._session.epoch, self._stage, part, opened)
                self._tell(one, awaited.sent, _encoded(claim.seal(self._session)))

    def _tell(self, one: Covered, sent: Mapping[int, bytes], received: bytes) -> None:
        if one.last:
            epoch, said = self._session.epoch, sent.get(one.seq, b"")
            self._reply(Roots(epoch, self._stage, one.seq, one.rows, one.in_root, one.out_root, said, received))

    def _refuse(self, one: Covered, why: str, delivery: bytes, proof: bytes) -> None:
        self._refused.append(one.seq)
        self._reply(Refused(self._session.epoch, self._stage, one.seq, why, delivery, proof))


def _encoded(envelope: Envelope) -> bytes:
    return canonical.encode(envelope.to_value())
