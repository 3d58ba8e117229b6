"""Bytes between Head and stages: what is encoded comes back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import ProtocolError
from serve_app.messages.controls import BIAS, CONTROL, Controls
from serve_app.messages.request import MICRO, Sampling
from serve_app.messages.step import (
    CLOSE,
    DRAW_EACH,
    MAX_GUESSES,
    MAX_ITEMS,
    OPEN,
    SPAN,
    Fault,
    Refused,
    Reply,
    Roots,
    Signed,
    StepPlan,
    StepResult,
    closing_plan,
    decode_reply,
    encode_reply,
)
from shard_tools import canonical

CONTROLLED = (
    Sampling(min_p_micro=50_000),
    Sampling(presence_micro=-1, logit_bias=((3, 5), (4, -100 * MICRO))),
    Sampling(frequency_micro=2 * MICRO, repetition_micro=MICRO // 100, min_p_micro=MICRO),
    Sampling(logit_bias=tuple((i, 1) for i in range(300))),
)

u32 = st.integers(0, (1 << 32) - 1)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows = st.one_of(
        st.tuples(st.integers(1, 50), st.integers(0, 5), st.integers(0, 1)),
        st.tuples(st.integers(2, 1 + MAX_GUESSES), st.integers(0, 5), st.just(DRAW_EACH)),
    )
    spans = [(*where, *what) for *where, what in draw(st.lists(st.tuples(u32, u32, rows), max_size=5))]
    pages = draw(st.lists(u32, min_size=sum(s[3] for s in spans), max_size=sum(s[3] for s in spans)))
    opens = np.zeros(draw(st.integers(0, 3)), OPEN)
    opens["seq"] = range(len(opens))
    closes = draw(st.lists(st.tuples(u32, u32, st.integers(0, 1)), max_size=3))
    signs = draw(st.lists(u32, max_size=3))
    return StepPlan(
        draw(u32),
        draw(u32),
        opens,
        np.array(spans, SPAN),
        np.array(pages, "<u4"),
        np.array(closes, CLOSE),
        np.array(signs, "<u8"),
        Controls.of((seq, draw(st.sampled_from((*CONTROLLED, Sampling()))), [7, 8, 9], 2) for seq in range(len(opens))),
    )


def same(a: object, b: object) -> bool:
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return np.array_equal(a, b)  # type: ignore[arg-type]


@given(plans(), st.binary(max_size=200))
def test_a_plan_and_its_rows_come_back(plan: StepPlan, rows: bytes) -> None:
    decoded, payload = StepPlan.decode(plan.encode(rows))
    assert same(plan, decoded)
    assert rows == bytes(payload)


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_a_damaged_message_is_refused_or_is_another_plan_but_never_a_crash(plan: StepPlan, data: st.DataObject) -> None:
    """No byte string makes decode raise anything but ProtocolError."""
    message = bytearray(plan.encode(b"rows"))
    if data.draw(st.booleans()):
        message = message[: data.draw(st.integers(0, len(message)))]
    else:
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        StepPlan.decode(bytes(message))
    except ProtocolError:
        pass


@given(plans())
def test_the_rows_that_are_drawn_from_are_those_of_the_spans_that_ask(plan: StepPlan) -> None:
    wanted, row = [], 0
    for count, sample in plan.spans[["count", "sample"]].tolist():
        row += count
        wanted += range(row - count, row) if sample == DRAW_EACH else [row - 1] * sample
    assert plan.drawn_rows.tolist() == wanted and plan.draws.sum() == len(wanted)


@pytest.mark.parametrize(("count", "sample"), [(1, 2), (2 + MAX_GUESSES, 2), (1 << 16, 2), (5, 3), (5, 255)])
def test_draws_that_there_are_not_are_refused(count: int, sample: int) -> None:
    """From no guess, from more than a witness could take back, or in no known way."""
    plan = dataclasses.replace(closing_plan(1, 1, 1), spans=np.array([(1, 0, count, 0, sample)], SPAN))
    with pytest.raises(ProtocolError, match="draws in no known way"):
        StepPlan.decode(plan.encode(b""))


def test_no_plan_asks_for_more_tokens_than_an_answer_may_hold() -> None:
    spans = np.array([(i, 0, 9, 0, DRAW_EACH) for i in range(MAX_ITEMS // 9 + 1)], SPAN)
    with pytest.raises(ProtocolError, match="more than 65536 tokens"):
        StepPlan.decode(dataclasses.replace(closing_plan(1, 1, 1), spans=spans).encode(b""))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (StepPlan.decode, decode_reply):
        with pytest.raises(ProtocolError):
            decode(noise)


REPLIES = st.one_of(
    st.builds(StepResult, u32, u32, st.lists(u32, max_size=9).map(tuple)),
    st.builds(
        Roots,
        u32,
        st.integers(0, 99),
        u32,
        u32,
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=32, max_size=32),
        st.binary(max_size=99),
        st.binary(max_size=99),
    ),
    st.builds(Signed, u32, st.integers(0, 99), u32, st.binary(min_size=1, max_size=99)),
    st.builds(Fault, u32, st.integers(0, 99), u32, st.text(max_size=99)),
    st.builds(
        Refused, u32, st.integers(0, 99), u32, st.text(max_size=99), st.binary(max_size=99), st.binary(max_size=99)
    ),
)


@given(REPLIES)
def test_a_reply_comes_back(reply: Reply) -> None:
    assert reply == decode_reply(encode_reply(reply))


def test_roots_are_told_as_ever_where_nobody_signs_for_rows_on_their_way() -> None:
    fields = canonical.decode(encode_reply(Roots(1, 2, 3, 4, bytes(32), bytes(32))), max_bytes=1000)
    assert isinstance(fields, dict) and sorted(fields) == ["e", "i", "in", "n", "out", "q", "r"]


def test_endings_of_a_failed_step_keep_what_closes_and_what_is_to_be_signed() -> None:
    plan = dataclasses.replace(
        closing_plan(3, 7, 12), signs=np.array([5], "<u8"), spans=np.array([(1, 0, 2, 0, 1)], SPAN)
    )
    left = plan.endings()
    assert left.rows == 0 and left.closes["seq"].tolist() == [7] and left.signs.tolist() == [5]


@pytest.mark.parametrize("spans", [[(1, 0, 0, 0, 0)], [(1, 0, 2, 0, 0), (2, 0, 0, 0, 1)]])
def test_a_span_without_rows_is_refused(spans: list[tuple[int, ...]]) -> None:
    """Also where no span of the step has any."""
    plan = dataclasses.replace(closing_plan(1, 9, 9), spans=np.array(spans, SPAN))
    with pytest.raises(ProtocolError, match="empty span"):
        StepPlan.decode(plan.encode(b""))


@pytest.mark.parametrize("field", range(3, 10))
def test_a_count_beyond_the_bounds_is_refused_before_anything_is_read(field: int) -> None:
    """magic, epoch, step, then seven counts: none can make the reader allocate."""
    header = [0x504D4C31, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    header[field] = (1 << 32) - 1
    with pytest.raises(ProtocolError, match="too many"):
        StepPlan.decode(struct.pack("<IIQIIIIIII", *header))


def test_a_fault_is_told_whatever_its_message_is_made_of() -> None:
    """An error may quote a file name that is no Unicode, or a whole matrix: the Head must still hear of it."""
    reply = decode_reply(encode_reply(Fault(1, 2, 3, "no file \udcff" + "x" * 9999)))
    assert isinstance(reply, Fault) and reply.message.startswith("no file ?") and len(reply.message) == 2000


@settings(max_examples=200, deadline=None)
@given(REPLIES, st.data())
def test_a_damaged_reply_is_refused_or_is_another_reply_but_never_a_crash(reply: Reply, data: st.DataObject) -> None:
    message = bytearray(encode_reply(reply))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    for received in (bytes(message), bytes(message[: data.draw(st.integers(0, len(message) - 1))])):
        try:
            decode_reply(received)
        except ProtocolError:
            pass


@pytest.mark.parametrize("sampling", CONTROLLED)
def test_controls_come_back_one_sequence_at_a_time(sampling: Sampling) -> None:
    """With the tokens that count, which are none where nothing counts them."""
    tokens = [5, 6, 7, 5]
    (one,) = Controls.of([(3, Sampling(), tokens, 3), (4, sampling, tokens, 3)])
    assert (one.seq, one.min_p_micro, one.repetition_micro) == (4, sampling.min_p_micro, sampling.repetition_micro)
    assert (one.presence_micro, one.frequency_micro) == (sampling.presence_micro, sampling.frequency_micro)
    assert tuple(one.biases.tolist()) == sampling.logit_bias
    assert one.ids.tolist() == (tokens if sampling.penalises else [])
    assert one.n_prompt == (3 if sampling.penalises else 0)


def opening(controls: Controls) -> StepPlan:
    opens = np.zeros(1, OPEN)
    opens["seq"] = 4
    return StepPlan(
        1, 2, opens, np.zeros(0, SPAN), np.zeros(0, "<u4"), np.zeros(0, CLOSE), np.zeros(0, "<u8"), controls
    )


@pytest.mark.parametrize(
    ("row", "ids", "biases"),
    [
        ((5, 1, 0, 0, MICRO, 0, 0, 0), [], []),  # another sequence than opens
        ((4, 0, 0, 0, MICRO, 0, 0, 0), [], []),  # nothing
        ((4, MICRO + 1, 0, 0, MICRO, 0, 0, 0), [], []),
        ((4, 0, 2 * MICRO + 1, 0, MICRO, 1, 1, 0), [7], []),
        ((4, 0, -(1 << 31), 0, MICRO, 1, 1, 0), [7], []),
        ((4, 0, 0, 1, 0, 1, 1, 0), [7], []),
        ((4, 0, 0, 1, MICRO, 2, 1, 0), [7], []),  # a longer prompt than there are ids
        ((4, 0, 0, 1, MICRO, 0, 1, 0), [7], []),  # no prompt
        ((4, 0, 0, 1, MICRO, 0, 0, 0), [], []),  # a penalty and no ids
        ((4, 1, 0, 0, MICRO, 1, 1, 0), [7], []),  # ids for nothing
        ((4, 0, 0, 1, MICRO, 1, 1, 0), [1 << 24], []),
        ((4, 0, 0, 0, MICRO, 0, 0, 2), [], [(3, 1), (3, 1)]),
        ((4, 0, 0, 0, MICRO, 0, 0, 2), [], [(4, 1), (3, 1)]),
        ((4, 0, 0, 0, MICRO, 0, 0, 1), [], [(3, 0)]),
        ((4, 0, 0, 0, MICRO, 0, 0, 1), [], [(3, -(1 << 31))]),
        ((4, 0, 0, 0, MICRO, 0, 0, 1), [], [(1 << 24, 5)]),
        ((4, 0, 0, 0, MICRO, 0, 0, 301), [], [(i, 1) for i in range(301)]),
        ((4, 0, 0, 0, MICRO, 0, 1 << 31, 1 << 31), [], []),
    ],
)
def test_controls_that_no_sampling_says_are_refused(
    row: tuple[int, ...], ids: list[int], biases: list[tuple[int, int]]
) -> None:
    plan = opening(Controls(np.array([row], CONTROL), np.array(ids, "<u4"), np.array(biases, BIAS)))
    with pytest.raises(ProtocolError, match="controls"):
        StepPlan.decode(plan.encode(b""))
