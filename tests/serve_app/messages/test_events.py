"""Bytes between an ingress and a Head: what is encoded comes back, and nothing else is accepted."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import ProtocolError
from serve_app.messages.events import (
    MAX_MESSAGE_BYTES,
    Accepted,
    AskStatus,
    Call,
    Held,
    Seek,
    Status,
    Stop,
    Submit,
    Told,
    decode_call,
    decode_events,
    encode_call,
    encode_events,
)
from serve_app.messages.request import (
    MICRO,
    FailedEvent,
    FailureKind,
    FinishedEvent,
    GenerationRequest,
    Once,
    RequestId,
    Sampling,
    TokensEvent,
)
from shard_tools import canonical
from shard_tools.canonical import Value
from shard_tools.cid import Cid, Codec

MANIFEST = Cid.of(Codec.DAG_CBOR, b"a manifest")
ids = st.text(max_size=40).map(RequestId)
tokens = st.lists(st.integers(0, 1 << 24), max_size=6).map(tuple)
digests = st.binary(min_size=32, max_size=32)
samplings = st.builds(
    Sampling,
    st.integers(0, 2 * MICRO),
    st.integers(0, 1 << 24),
    st.integers(1, MICRO),
    st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
    st.just(0) | st.integers(0, MICRO),
    st.just(0) | st.integers(-2 * MICRO, 2 * MICRO),
    st.just(0) | st.integers(-2 * MICRO, 2 * MICRO),
    st.just(MICRO) | st.integers(MICRO // 100, 10 * MICRO),
    st.dictionaries(
        st.integers(0, (1 << 24) - 1), st.integers(1, 100 * MICRO) | st.integers(-100 * MICRO, -1), max_size=3
    ).map(lambda biases: tuple(sorted(biases.items()))),
)
requests = st.builds(
    GenerationRequest,
    ids,
    st.just(MANIFEST),
    tokens,
    st.integers(1, 1 << 20),
    samplings,
    tokens,
    st.binary(max_size=32),
    st.binary(min_size=32, max_size=32),
    timeout_ms=st.none() | st.integers(1, 86_400_000),
    once=st.none() | st.builds(Once, digests, digests),
)
CALLS: st.SearchStrategy[Call] = st.one_of(
    st.builds(Submit, requests), st.builds(Stop, ids, st.booleans()), st.just(AskStatus()), st.builds(Seek, digests)
)
EVENTS: st.SearchStrategy[Told] = st.one_of(
    st.builds(Accepted, ids, digests),
    st.builds(Held, digests, st.booleans()),
    st.builds(TokensEvent, ids, tokens),
    st.builds(FinishedEvent, ids, st.sampled_from(["stop", "length", "cancelled", "error"]), st.binary(max_size=50)),
    st.builds(
        FailedEvent,
        ids,
        st.sampled_from(get_args(FailureKind)),
        st.text(max_size=50),
        st.binary(max_size=50),
    ),
)
STATUSES = st.none() | st.builds(
    Status, st.dictionaries(st.text(max_size=5), st.none() | st.integers(0, 99) | st.text(max_size=5), max_size=4)
)


@given(CALLS)
def test_a_call_comes_back(call: Call) -> None:
    assert decode_call(encode_call(call)) == call


@given(st.lists(EVENTS, max_size=5), STATUSES)
def test_events_and_a_status_come_back(events: list[Told], status: Status | None) -> None:
    assert decode_events(encode_events(events, status)) == (events, status)


@settings(max_examples=200, deadline=None)
@given(CALLS, st.lists(EVENTS, min_size=1, max_size=3), st.data())
def test_damaged_bytes_are_refused_or_mean_something_else_but_never_crash(
    call: Call, events: list[Told], data: st.DataObject
) -> None:
    """No byte string makes a decoder raise anything but ProtocolError; one cut short is always refused."""
    for message, decode in ((encode_call(call), decode_call), (encode_events(events), decode_events)):
        with pytest.raises(ProtocolError):
            decode(message[: data.draw(st.integers(0, len(message) - 1))])
        flipped = bytearray(message)
        flipped[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            decode(bytes(flipped))
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    "value",
    [
        {"ev": [], "st": 5},
        {"ev": [], "st": []},
        {"ev": []},
        {"ev": [5], "st": None},
        {"ev": [{"e": "tokens", "id": "a", "t": [-1]}], "st": None},
        {"ev": [{"e": "tokens", "id": "a", "t": [True]}], "st": None},
        {"ev": [{"e": "tokens", "id": "a" * 101, "t": []}], "st": None},
        {"ev": [{"e": "end", "id": "a", "why": "bored", "r": b""}], "st": None},
        {"ev": [{"e": "fail", "id": "a", "k": "whim", "m": "", "s": b""}], "st": None},
        {"ev": [{"e": "dance", "id": "a"}], "st": None},
        {"ev": [], "st": None, "more": 1},
    ],
)
def test_events_that_no_head_sends_are_refused(value: Value) -> None:
    """Bounds, closed sets and types, each by one offender."""
    with pytest.raises(ProtocolError):
        decode_events(canonical.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        {"c": "dance"},
        {"c": "status", "more": 1},
        {"c": "stop", "id": "a", "keep": 1},
        {"c": "stop", "id": "a" * 101, "keep": True},
        {"c": "submit", "r": b"noise"},
        {"c": "submit", "r": b""},
    ],
)
def test_calls_that_no_ingress_makes_are_refused(value: Value) -> None:
    with pytest.raises(ProtocolError):
        decode_call(canonical.encode(value))


def test_a_call_larger_than_any_request_is_refused_by_its_size() -> None:
    with pytest.raises(ProtocolError, match=f"at most {MAX_MESSAGE_BYTES}"):
        decode_call(bytes(MAX_MESSAGE_BYTES + 1))


def test_a_failure_is_told_whatever_its_message_is_made_of() -> None:
    """One error that quotes bytes which are no Unicode must not silence the events beside it."""
    [event], _ = decode_events(encode_events([FailedEvent(RequestId("a"), "pipeline", "no \udcff" + "x" * 9999)]))
    assert isinstance(event, FailedEvent) and event.message.startswith("no ?x") and len(event.message) == 4000
