"""Requests, responses and receipts are read back from whatever form a client kept them in."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.wire import CompletionBody, parse
from serve_app.messages.request import Sampling
from serve_app.transcript import GotResponse, find_receipt, parse_request, parse_response
from shard_tools.errors import FormatError, InputError
from tests.serve_app.receipts.pipeline_of_three import Cluster

FIELDS = {"messages", "prompt", "stop", "temperature", "top_p", "top_k", "seed", "llmd", "nonce", "receipt", "choices"}
PARTS = {"message", "delta", "content", "role", "name", "text", "finish_reason", "max_tokens", "error"}
KEYS = st.sampled_from(sorted(FIELDS | PARTS))
BUNDLE = Cluster().bundle()


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def as_stream(*chunks: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


def delta(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}]}


def test_a_chat_request_is_read_as_the_server_reads_it() -> None:
    """Parts joined, developer renamed, numbers in millionths rounded half to even, defaults of the API."""
    sent = parse_request(
        b'{"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"},'
        b'{"type": "text", "text": "b"}]},'
        b'{"role": "user", "content": "hi", "name": "me"}, {"role": "assistant", "content": null}],'
        b'"temperature": 0.7000005, "top_p": 0.9, "seed": -3, "stop": "END", "max_completion_tokens": 9,'
        b'"llmd": {"nonce": "' + b"ab" * 32 + b'"}}'
    )
    assert sent.messages == (
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "hi", "name": "me"},
        {"role": "assistant", "content": ""},
    )
    assert sent.sampling == Sampling(700_000, 0, 900_000, -3)
    assert (sent.stops, sent.max_tokens, sent.nonce) == (("END",), 9, b"\xab" * 32)
    plain = parse_request(as_json(prompt=["hello"]))
    assert (plain.prompt, plain.sampling, plain.max_tokens, plain.nonce) == ("hello", Sampling(), None, b"")
    assert (
        parse_request(as_json(prompt=[1, 2])).prompt_ids == parse_request(as_json(prompt=[[1, 2]])).prompt_ids == (1, 2)
    )


def test_controls_are_read_as_the_server_reads_them() -> None:
    body = {
        "model": "m",
        "prompt": "a",
        "min_p": 0.0500005,
        "presence_penalty": -0.1,
        "frequency_penalty": 2,
        "repetition_penalty": 1.3,
        "logit_bias": {"70": -100, "9": 0.25, "8": 0},
    }
    data = json.dumps(body).encode()
    assert parse_request(data).sampling == parse(data, CompletionBody).sampling()
    for wrong in ({"min_p": 2}, {"presence_penalty": "x"}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"5": 101}}):
        with pytest.raises(InputError):
            parse_request(json.dumps(body | wrong).encode())


def test_a_response_is_the_same_answer_in_every_form() -> None:
    """JSON of both endpoints, a stream, and bare text."""
    chat = as_json(choices=[{"message": {"content": "ab"}, "finish_reason": "stop"}], llmd={"receipt": "R"})
    completion = as_json(choices=[{"text": "ab", "finish_reason": "stop"}], llmd={"receipt": "R"})
    stream = as_stream(
        delta(""), delta("a"), delta("b"), delta("", "stop") | {"llmd": {"receipt": "R"}}, {"choices": []}
    )
    for data in (chat, completion, stream):
        assert parse_response(data) == GotResponse("ab", "stop", "R")
    assert parse_response(b"ab") == GotResponse("ab", None, None)


def test_a_receipt_is_found_in_every_form() -> None:
    """Raw, base64url with a newline, inside a response, inside a stream."""
    text = BUNDLE.to_text()
    for data in (
        BUNDLE.encode(),
        text.encode() + b"\n",
        as_json(choices=[], llmd={"receipt": text}),
        as_stream(delta("a"), delta("", "stop") | {"llmd": {"receipt": text}}),
    ):
        assert find_receipt(data) == BUNDLE.encode()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b"\xff", "not UTF-8"),
        (b"{}", "neither messages nor one prompt"),
        (as_json(prompt=["a", "b"]), "expected an integer"),
        (as_json(messages="hi"), "expected a list"),
        (as_json(messages=[{"content": "x"}]), "role: expected a text"),
        (as_json(messages=[{"role": "user", "content": 3}]), "content: expected a text"),
        (b'{"prompt": "a", "temperature": 1e999999}', "from 0 to 2"),
        (b'{"prompt": "a", "temperature": NaN}', "expected a number"),
        (as_json(prompt="a", top_p=0), "top_p is out of range"),
        (as_json(prompt="a", stop=[1]), "stop: expected a text"),
        (as_json(prompt="a", temperature="hot"), "expected a number"),
        (as_json(prompt="a", seed=True), "expected an integer"),
        (as_json(prompt="a", llmd={"nonce": "abc"}), "is no nonce"),
    ],
)
def test_what_is_no_request_is_refused(data: bytes, match: str) -> None:
    """The message says what was expected."""
    with pytest.raises(InputError, match=match):
        parse_request(data)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, ANY_JSON, max_size=6))
def test_any_json_is_read_or_refused(value: dict[str, Any]) -> None:
    """Whatever stands where, the answer is a value or an InputError (FormatError for a receipt's text)."""
    data = json.dumps(value).encode()
    for read in (parse_request, parse_response, find_receipt, lambda raw: parse_response(b"data: " + raw)):
        with suppress(InputError, FormatError):
            read(data)


def test_what_is_no_receipt_is_refused() -> None:
    """An answer without one, an error, other text."""
    with pytest.raises(InputError, match="carries no receipt"):
        find_receipt(as_json(choices=[]))
    with pytest.raises(InputError, match="is an error, not an answer"):
        find_receipt(as_stream({"error": {"message": "no"}}))
    for data in (b"hello there!", b"AB==", b"A"):
        with pytest.raises(FormatError, match="base64url"):
            find_receipt(data)
