"""Bodies: understood, or refused with a RequestError; nothing else comes out, whatever goes in."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.openai_fields import HARMLESS, NEUTRAL
from serve_app.api.wire import ChatBody, CompletionBody, micro, parse
from serve_app.errors import RequestError
from serve_app.messages.request import Sampling

GOOD_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GOOD_COMPLETION = {"model": "m", "prompt": "hi"}
KINDS = [(ChatBody, GOOD_CHAT), (CompletionBody, GOOD_COMPLETION)]

texts = st.text("ab0 \x00é🌍", max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
names = st.sampled_from(sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL, *HARMLESS}))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for kind, _ in KINDS:
        with pytest.raises(RequestError):
            parse(data, kind)


@given(st.dictionaries(names, values, max_size=3))
def test_arbitrary_values_in_known_fields_are_understood_or_refused(change: dict[str, object]) -> None:
    for kind, good in KINDS:
        try:
            body = parse(json.dumps(good | change).encode(), kind)
            assert isinstance(body, ChatBody | CompletionBody)
            body.sampling(), body.stops(), body.nonce(), body.asked_tokens()
            if isinstance(body, CompletionBody):
                assert body.one_prompt()
        except RequestError as e:
            assert len(str(e)) < 3000 and str(e).endswith(".")


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_field_we_do_not_act_on_passes_only_with_a_value_that_changes_nothing(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        assert parse(json.dumps(GOOD_CHAT | {name: value}).encode(), ChatBody) == parse(
            json.dumps(GOOD_CHAT).encode(), ChatBody
        )
    with pytest.raises(RequestError, match=name):
        parse(json.dumps(GOOD_CHAT | {name: {"something": "else"}}).encode(), ChatBody)


def test_numbers_become_millionths_of_what_was_written() -> None:
    assert [micro(x) for x in (0.0, 0.7, 1.0, 2.0, 0.1 + 0.2)] == [0, 700_000, 1_000_000, 2_000_000, 300_000]
    assert [micro(x) for x in (5e-7, 1.5e-6, 2.5e-6, 4e-7)] == [0, 2, 2, 0], "halves go to the even neighbour"
    body = parse(json.dumps(GOOD_CHAT | {"temperature": 0, "top_p": 0.9, "top_k": 40, "seed": -1}).encode(), ChatBody)
    assert body.sampling() == Sampling(0, 40, 900_000, -1)
    assert parse(json.dumps(GOOD_CHAT).encode(), ChatBody).sampling() == Sampling()


def test_controls_become_millionths_and_say_nothing_where_they_change_nothing() -> None:
    asked = {"min_p": 0.05, "presence_penalty": -0.5, "frequency_penalty": 2, "repetition_penalty": 1.1}
    body = parse(json.dumps(GOOD_CHAT | asked | {"logit_bias": {"70": -100, "9": 0.5, "8": 0}}).encode(), ChatBody)
    assert body.sampling() == Sampling(
        min_p_micro=50_000,
        presence_micro=-500_000,
        frequency_micro=2_000_000,
        repetition_micro=1_100_000,
        logit_bias=((9, 500_000), (70, -100_000_000)),
    )
    nothing = {"min_p": 0, "presence_penalty": 0, "frequency_penalty": None, "repetition_penalty": 1, "logit_bias": {}}
    said = parse(json.dumps(GOOD_CHAT | nothing).encode(), ChatBody).sampling()
    assert said == Sampling() and said.to_value() == {"t": 1_000_000, "k": 0, "p": 1_000_000, "seed": None}


@given(st.integers(0, 2_000_000))
def test_micro_reads_back_every_millionth(n: int) -> None:
    assert micro(float(Decimal(n) / 1_000_000)) == n


@pytest.mark.parametrize(
    ("header", "field", "level"),
    [
        (None, {}, "signed"),
        ("audited", {}, "audited"),
        (None, {"llmd": {"assurance": "audited"}}, "audited"),
        ("audited", {"llmd": {"assurance": "audited"}}, "audited"),
        ("audited", {"llmd": {"assurance": "signed"}}, None),
        ("exact", {}, "exact"),
        (None, {"llmd": {"assurance": "exact"}}, "exact"),
        ("exact", {"llmd": {"assurance": "audited"}}, None),
        ("Audited", {}, None),
        ("", {}, None),
    ],
)
def test_a_level_is_taken_as_asked_or_refused(header: str | None, field: dict[str, Any], level: str | None) -> None:
    """Never another one than was asked for."""
    body = parse(json.dumps({"model": "m", "prompt": "x", **field}).encode(), CompletionBody)
    if level is not None:
        assert body.assurance(header) == level
    else:
        with pytest.raises(RequestError) as refused:
            body.assurance(header)
        assert refused.value.param == "llmd.assurance"
