"""What a client sent and what it got, read back from files, to be held against a receipt.

Reads the JSON of a request; a response as JSON, as server-sent events, or as its bare text; and a receipt in any
form it may have been saved in. Written against the public HTTP interface, not with the server's own parser: a
check that shares its code with what it checks would share its mistakes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from serve_app.errors import RequestError
from serve_app.messages.request import MICRO, NONCE_BYTES, Assurance, Sampling, assurance_of
from serve_app.receipts.bundle import MAX_BUNDLE_BYTES, bytes_of_text
from shard_tools.canonical import Value
from shard_tools.errors import FormatError, InputError

MAX_TRANSCRIPT_BYTES = 4 * MAX_BUNDLE_BYTES  # a stream repeats its labels with every piece of text


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request of either endpoint: exactly one of messages, prompt and prompt_ids is there."""

    messages: tuple[Mapping[str, Value], ...] | None
    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    stops: tuple[str, ...]
    sampling: Sampling
    max_tokens: int | None  # None: left to the server
    nonce: bytes  # empty: none was sent
    assurance: Assurance | None  # None: not in the body, and a header may have said it


@dataclass(frozen=True, slots=True)
class GotResponse:
    """An answer as the client has it. finish_reason and receipt are None where the file does not say."""

    text: str
    finish_reason: str | None
    receipt: str | None


def parse_request(data: bytes) -> SentRequest:
    """Read a request's JSON. Raises InputError."""
    body = _json_object(data, "the request")
    messages = prompt = ids = None
    if "messages" in body:
        messages = tuple(_turn(item) for item in _list(body["messages"], "messages"))
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list):
            ids, prompt = tuple(_integer(item, "prompt") for item in prompt), None
        elif not isinstance(prompt, str):
            raise InputError("the request has neither messages nor one prompt: is it the JSON that was sent?")
    stops = body.get("stop") or []
    own = _object(body.get("llmd") or {}, "llmd")
    nonce, level = own.get("nonce", ""), own.get("assurance")
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    return SentRequest(
        messages,
        prompt,
        ids,
        tuple(_string(stop, "stop") for stop in ([stops] if isinstance(stops, str) else _list(stops, "stop"))),
        _sampling(body),
        None if asked is None else _integer(asked, "max_tokens"),
        parse_nonce(nonce) if nonce else b"",
        None if level is None else parse_assurance(level),
    )


def parse_response(data: bytes) -> GotResponse:
    """Read a response: JSON, a stream of server-sent events, or else text alone. Raises InputError."""
    text = _text(data, "the response")
    if text.lstrip().startswith("{"):
        chunks = [_json_object(data, "the response")]
    elif text.lstrip().startswith(("data:", "event:", ":")):
        chunks = list(_events(text))
    else:
        return GotResponse(text, None, None)
    said: list[str] = []
    reason = receipt = None
    for chunk in chunks:
        if "error" in chunk:
            raise InputError(f"the response is an error, not an answer: {str(chunk['error'])[:200]}")
        for item in _list(chunk.get("choices") or [], "choices"):
            choice = _object(item, "choices")
            turn = _object(choice.get("message") or choice.get("delta") or choice, "message")
            said.append(_string(turn.get("content") or turn.get("text") or "", "content"))
            reason = _string(choice.get("finish_reason") or reason or "", "finish_reason") or None
        receipt = _string(_object(chunk.get("llmd") or {}, "llmd").get("receipt") or receipt or "", "receipt") or None
    return GotResponse("".join(said), reason, receipt)


def find_receipt(data: bytes) -> bytes:
    """The bundle's bytes in a file that holds them raw, as base64url, or inside a response.

    Raises InputError where there is no receipt, FormatError where it is not base64url.
    """
    if data[:1] and data[0] >> 5 == 5:  # a CBOR map; no text begins with such a byte
        return data
    text = _text(data, "the receipt file").strip()
    if not text.startswith(("{", "data:", "event:", ":")):
        return bytes_of_text(text)
    receipt = parse_response(data).receipt
    if receipt is None:
        raise InputError("this response carries no receipt: it has no llmd.receipt")
    return bytes_of_text(receipt)


def parse_assurance(text: object) -> Assurance:
    """A level's name. Raises InputError."""
    try:
        return assurance_of(str(text)[:80])
    except FormatError as e:
        raise InputError(str(e)) from e


def parse_nonce(text: object) -> bytes:
    """A client's nonce from hex. Raises InputError."""
    try:
        nonce = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise InputError(f"{str(text)[:80]!r} is no nonce: expected {2 * NONCE_BYTES} hex digits")
    return nonce


def _sampling(body: Mapping[str, Any]) -> Sampling:
    seed = body.get("seed")
    try:
        return Sampling(
            _micro(body.get("temperature"), "temperature", 0, 2, 1),
            _integer(body.get("top_k") or 0, "top_k"),
            _micro(body.get("top_p"), "top_p", 0, 1, 1),
            None if seed is None else _integer(seed, "seed"),
            _micro(body.get("min_p"), "min_p", 0, 1, 0),
            _micro(body.get("presence_penalty"), "presence_penalty", -2, 2, 0),
            _micro(body.get("frequency_penalty"), "frequency_penalty", -2, 2, 0),
            _micro(body.get("repetition_penalty"), "repetition_penalty", 0, 10, 1),
            _biases(_object(body.get("logit_bias") or {}, "logit_bias")),
        )
    except RequestError as e:
        raise InputError(f"no server of ours took this request: {e}") from e


def _biases(given: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """By rising id, those that change something."""
    pairs = []
    for id, value in given.items():
        if not id.isdecimal() or not id.isascii():
            raise InputError(f"logit_bias: {id[:40]!r} is no token id")
        pairs.append((int(id[:20]), _micro(value, "logit_bias", -100, 100, 0)))
    return tuple((id, micro) for id, micro in sorted(pairs) if micro)


def _turn(item: object) -> Mapping[str, Value]:
    """A message as the server gives it to the chat template (PROTOCOL.md, "From text to ids")."""
    turn = _object(item, "messages")
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = "".join(_string(_object(part, "content").get("text"), "content.text") for part in content)
    role = _string(turn.get("role"), "role")
    said: dict[str, Value] = {
        "role": "system" if role == "developer" else role,
        "content": _string(content, "content"),
    }
    return said | ({"name": _string(turn["name"], "name")} if turn.get("name") else {})


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield _json_object(data.encode(), "an event of the response")


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(data, what), parse_float=Decimal)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{what} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def _text(data: bytes, what: str) -> str:
    if len(data) > MAX_TRANSCRIPT_BYTES:
        raise InputError(f"{what} has {len(data)} bytes; at most {MAX_TRANSCRIPT_BYTES} are read")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{what} is not UTF-8: {e}") from e


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a list, found {type(value).__name__}")
    return value


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected an object, found {type(value).__name__}")
    return value


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a text, found {type(value).__name__}")
    return value


def _integer(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}: expected an integer, found {str(value)[:40]!r}")
    return value


def _micro(value: object, name: str, low: int, high: int, absent: int) -> int:
    """Millionths, halves to even; of `absent` where there is no value."""
    if value is None:
        return absent * MICRO
    if not isinstance(value, int | Decimal) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name}: expected a number from {low} to {high}, found {str(value)[:40]!r}")
    return int((Decimal(value) * MICRO).to_integral_value(ROUND_HALF_EVEN))
