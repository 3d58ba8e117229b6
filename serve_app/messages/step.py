"""What crosses from the Head down the stages and back: fixed-layout arrays, no pickle.

A *plan* says what one pass through the stages does: which sequences open, which rows run, which close, which
are to be signed. It travels with its rows: token ids into stage 0, activations into every later stage.
Replies go from any stage straight to the Head. Laws: decode(encode(x)) == x; decode raises ProtocolError for
every other byte string. Byte layout: PROTOCOL.md. Knows nothing of torch, Ray or sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import ProtocolError
from serve_app.messages.controls import NO_CONTROLS, Controls
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.errors import FormatError

OPEN = np.dtype(
    [
        ("seq", "<u8"),
        ("request", "u1", (32,)),  # request_hash: what the stage's statement will be bound to
        ("key", "u1", (8,)),  # of the sampling noise; the last stage uses it
        ("temperature_micro", "<u4"),
        ("top_k", "<u4"),
        ("top_p_micro", "<u4"),
        ("attempt", "<u4"),  # how often the request has begun anew; its statements say so
        # Rows whose keys and values lie in the first pages of its span already, whole pages of them: the span starts
        # behind, in the same plan.
        ("cached", "<u4"),
    ]
)
SPAN = np.dtype(
    [
        ("seq", "<u8"),
        ("start", "<u4"),  # position of the first row
        ("count", "<u4"),  # rows of this sequence in this step
        ("new_pages", "<u4"),  # how many ids of `pages` are this span's
        ("sample", "u1"),  # NO_DRAW, DRAW_NEXT or DRAW_EACH
    ]
)
# What follows no row, the last one, or each. Of each: rows after the first are guesses, and the sequence goes on behind
# the last of them that was right (or behind the first row), so that the others are void.
NO_DRAW, DRAW_NEXT, DRAW_EACH = 0, 1, 2
# In one span. Nine rows end one page of 16 hashed rows at most, which is what a witness can take back; and guesses
# beyond the eighth are seldom right.
MAX_GUESSES = 8
# rows: those that count; some more may have run before it was known that the sequence ends.
CLOSE = np.dtype([("seq", "<u8"), ("rows", "<u4"), ("seal", "u1")])
FORGET, SEAL, ABANDON = 0, 1, 2  # seal: nobody asks; tell the Head both roots; the same request begins anew later

Array = npt.NDArray[Any]

_MAGIC = 0x504D4C31
_HEADER = struct.Struct("<IIQIIIIIII")  # magic, epoch, step, opens, spans, pages, closes, signs, controls, rows
DRAWN_LAST = (
    0xFFFFFFFF  # in place of a token id: the one this stage drew last for the sequence, unknown to the Head yet
)
MAX_ITEMS = 1 << 16  # of each kind in one plan: 256 sequences is a large step today
MAX_ROWS = 1 << 17
MAX_PAYLOAD_BYTES = 1 << 30


def _none(dtype: Any) -> Array:
    return np.zeros(0, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One micro-batch. Rows lie in span order; pages hold each span's new page ids, in span order."""

    epoch: int
    step: int
    opens: Array  # OPEN
    spans: Array  # SPAN
    pages: Array  # uint32
    closes: Array  # CLOSE
    signs: Array  # uint64, sequences whose roots matched everywhere
    controls: Controls = NO_CONTROLS  # of those that open here and draw by more than OPEN says

    @property
    def rows(self) -> int:
        """Rows that run in this step."""
        return int(self.spans["count"].sum(dtype=np.int64))

    @property
    def draws(self) -> Array:
        """How many tokens each span asks for, int64."""
        sample = self.spans["sample"]
        return np.where(sample == DRAW_EACH, self.spans["count"], sample).astype(np.int64)

    @property
    def drawn_rows(self) -> Array:
        """Which rows tokens are drawn from, int64, in the order of the tokens."""
        last, draws = np.cumsum(self.spans["count"], dtype=np.int64) - 1, self.draws
        if not (draws > 1).any():
            return last[draws > 0]
        return np.repeat(last + 1 - np.cumsum(draws), draws) + np.arange(draws.sum())

    def endings(self) -> StepPlan:
        """The same without rows: what is left of a step that could not run."""
        return StepPlan(self.epoch, self.step, _none(OPEN), _none(SPAN), _none("<u4"), self.closes, self.signs)

    def encode(self, payload: bytes | memoryview) -> bytes:
        """The message: this plan and the bytes of its rows."""
        head = _HEADER.pack(
            _MAGIC,
            self.epoch,
            self.step,
            len(self.opens),
            len(self.spans),
            len(self.pages),
            len(self.closes),
            len(self.signs),
            len(self.controls.rows),
            self.rows,
        )
        arrays = (self.opens, self.spans, self.pages, self.closes, self.signs)
        return b"".join((head, *(a.tobytes() for a in arrays), self.controls.encode(), payload))

    @classmethod
    def decode(cls, message: bytes) -> tuple[StepPlan, memoryview]:
        """The plan and the bytes of its rows (a view into message). Raises ProtocolError."""
        if not _HEADER.size <= len(message) <= MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a step message of {len(message)} bytes")
        magic, epoch, step, *counts, n_controls, rows = _HEADER.unpack_from(message)
        if magic != _MAGIC or max(*counts, n_controls) > MAX_ITEMS or rows > MAX_ROWS:
            raise ProtocolError("not a step message of this version, or one with too many items")
        view, offset, arrays = memoryview(message), _HEADER.size, []
        kinds: tuple[np.dtype[Any], ...] = (OPEN, SPAN, np.dtype("<u4"), CLOSE, np.dtype("<u8"))
        for dtype, count in zip(kinds, counts, strict=True):
            end = offset + count * dtype.itemsize
            if end > len(message):
                raise ProtocolError("a step message was cut short")
            arrays.append(np.frombuffer(view[offset:end], dtype))
            offset = end
        controls, payload = Controls.decode(view[offset:], n_controls, arrays[0])
        opens, spans, pages, closes, signs = arrays
        plan = cls(epoch, step, opens, spans, pages, closes, signs, controls)
        if plan.rows != rows or int(plan.spans["new_pages"].sum(dtype=np.int64)) != len(plan.pages):
            raise ProtocolError("a step message whose spans do not add up to its rows or pages")
        if not plan.spans["count"].all():
            raise ProtocolError("a step message with an empty span")
        _check_draws(plan)
        return plan, payload


def _check_draws(plan: StepPlan) -> None:
    sample, count = plan.spans["sample"], plan.spans["count"]
    each = count[sample == DRAW_EACH]
    if (sample > DRAW_EACH).any() or (each < 2).any() or (each > 1 + MAX_GUESSES).any():
        raise ProtocolError(f"a step message that draws in no known way, or from no or over {MAX_GUESSES} guesses")
    if int(plan.draws.sum()) > MAX_ITEMS:
        raise ProtocolError(f"a step message that asks for more than {MAX_ITEMS} tokens")


def closing_plan(epoch: int, seq: int, rows: int) -> StepPlan:
    """A plan that only makes every stage forget one sequence."""
    closes = np.array([(seq, rows, FORGET)], CLOSE)
    return StepPlan(epoch, 0, _none(OPEN), _none(SPAN), _none("<u4"), closes, _none("<u8"))


def passing_plan(counts: Sequence[int], page_size: int) -> StepPlan:
    """A plan of sequences of so many rows that open and close with it; it travels nowhere."""
    needed = [-(-count // page_size) for count in counts]
    opens = np.zeros(len(counts), OPEN)
    opens["seq"] = range(len(counts))
    spans = [(seq, 0, count, pages, 0) for seq, (count, pages) in enumerate(zip(counts, needed, strict=True))]
    closes = [(seq, count, FORGET) for seq, count in enumerate(counts)]
    pages = np.arange(sum(needed), dtype="<u4")
    return StepPlan(0, 0, opens, np.array(spans, SPAN), pages, np.array(closes, CLOSE), _none("<u8"))


def forgetting_plan(seqs: Iterable[int]) -> StepPlan:
    """A plan that makes an engine forget these sequences; it travels nowhere."""
    closes = np.array([(seq, 0, FORGET) for seq in seqs], CLOSE)
    return StepPlan(0, 0, _none(OPEN), _none(SPAN), _none("<u4"), closes, _none("<u8"))


@dataclass(frozen=True, slots=True)
class StepResult:
    """The last stage finished a step. tokens: as many as each span asked for, in the order of rows."""

    epoch: int
    step: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Roots:
    """A stage has hashed all it received and sent for a closed sequence."""

    epoch: int
    stage: int
    seq: int
    rows: int
    in_root: bytes
    out_root: bytes
    # Envelopes, encoded, of Sent and Received (receipts/transit.py); empty where an edge goes without signatures.
    sent: bytes = b""
    received: bytes = b""


@dataclass(frozen=True, slots=True)
class Signed:
    """A stage's statement about a sequence: an encoded Envelope."""

    epoch: int
    stage: int
    seq: int
    statement: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """A stage could not do a step. The sequences of that step cannot go on."""

    epoch: int
    stage: int
    step: int
    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The stage before did not sign for the rows of this sequence that came, or signed for others."""

    epoch: int
    stage: int  # that refuses them
    seq: int
    message: str
    delivery: bytes  # what came instead, encoded; empty: nothing
    proof: bytes  # a TransitProof, encoded; empty: none


Reply = StepResult | Roots | Signed | Fault | Refused

NO_STEP = (1 << 63) - 1  # in a Fault: not of a step that runs; the pipeline cannot go on
_U32, _U64 = (1 << 32) - 1, (1 << 63) - 1
MAX_REPLY_BYTES = 1 << 20
_MAX_WORD = 32 << 10  # of what a stage signs about rows on their way: twice the largest proof
_RESULT_MAGIC = 0x524D4C31  # its first byte on the wire, 0x31, begins no canonical map
_RESULT = struct.Struct("<IIQI")  # magic, epoch, step, tokens
_RESULT_START = _RESULT_MAGIC.to_bytes(4, "little")


def encode_reply(reply: Reply) -> bytes:
    """The bytes of one reply to the Head."""
    match reply:
        case StepResult(epoch, step, tokens):
            # The one reply that comes with every step: as canonical values, 256 tokens cost 0.7 ms on their way.
            return _RESULT.pack(_RESULT_MAGIC, epoch, step, len(tokens)) + np.array(tokens, "<u4").tobytes()
        case Roots(epoch, stage, seq, rows, in_root, out_root, sent, received):
            claims: dict[str, Value] = {k: v for k, v in (("sent", sent), ("got", received)) if v}
            return canonical.encode(
                {"r": "roots", "e": epoch, "i": stage, "q": seq, "n": rows, "in": in_root, "out": out_root, **claims}
            )
        case Signed(epoch, stage, seq, statement):
            return canonical.encode({"r": "signed", "e": epoch, "i": stage, "q": seq, "b": statement})
        case Fault(epoch, stage, step, message):
            # An error may quote a file name that is no Unicode: the Head must hear of it all the same.
            said = message[:2000].encode("utf-8", "replace").decode()
            return canonical.encode({"r": "fault", "e": epoch, "i": stage, "s": step, "m": said})
        case Refused(epoch, stage, seq, message, delivery, proof):
            fields: dict[str, Value] = {
                "e": epoch,
                "i": stage,
                "q": seq,
                "m": message[:2000],
                "d": delivery,
                "p": proof,
            }
            return canonical.encode({"r": "refused", **fields})


def decode_reply(data: bytes) -> Reply:
    """Read encode_reply's bytes. Raises ProtocolError."""
    if data.startswith(_RESULT_START):
        return _decode_result(data)
    try:
        with Fields(canonical.decode(data, max_bytes=MAX_REPLY_BYTES), "reply") as f:
            kind, epoch = f.text("r", 10), f.integer("e", 0, _U32)
            stage = f.integer("i", 0, 4096)
            if kind == "roots":
                seq, rows = f.integer("q", 0, _U64), f.integer("n", 0, _U32)
                in_root, out_root = f.data("in", 32, 32), f.data("out", 32, 32)
                sent, received = (f.data(k, 1, _MAX_WORD) if f.has(k) else b"" for k in ("sent", "got"))
                return Roots(epoch, stage, seq, rows, in_root, out_root, sent, received)
            if kind == "signed":
                return Signed(epoch, stage, f.integer("q", 0, _U64), f.data("b", 1, 1 << 16))
            if kind == "fault":
                return Fault(epoch, stage, f.integer("s", 0, _U64), f.text("m", 2000))
            if kind == "refused":
                seq, message = f.integer("q", 0, _U64), f.text("m", 2000)
                return Refused(epoch, stage, seq, message, f.data("d", 0, _MAX_WORD), f.data("p", 0, _MAX_WORD))
            raise ProtocolError(f"a reply of unknown kind {kind!r}")
    except FormatError as e:
        raise ProtocolError(f"not a stage's reply: {e}") from e


def _decode_result(data: bytes) -> StepResult:
    if not _RESULT.size <= len(data) <= MAX_REPLY_BYTES:
        raise ProtocolError(f"a step's result of {len(data)} bytes")
    _, epoch, step, count = _RESULT.unpack_from(data)
    if count > MAX_ITEMS or len(data) != _RESULT.size + 4 * count or step > _U64:
        raise ProtocolError(f"a step's result of {count} tokens in {len(data)} bytes")
    return StepResult(epoch, step, tuple(np.frombuffer(data, "<u4", count, _RESULT.size).tolist()))
