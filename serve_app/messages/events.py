"""What crosses between an ingress and a Head, in both directions. One message a step for all of an ingress's requests.

Law: decode(encode(x)) == x. Canonical DAG-CBOR; decode raises ProtocolError for anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from serve_app.errors import ProtocolError
from serve_app.messages.request import (
    MAX_REQUEST_BYTES,
    MAX_TOKENS,
    MAX_VOCAB,
    NONCE_BYTES,
    Event,
    FailedEvent,
    FailureKind,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    TokensEvent,
)
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.errors import FormatError

KEY_DIGEST_BYTES = 32  # SHA-256
MAX_RESUMED = 16  # times that a request may change its Head
MAX_MESSAGE_BYTES = 2 * MAX_REQUEST_BYTES + (1 << 16)  # a request, and what it has drawn
_MAX_EVENTS = 1 << 16
_MAX_RECEIPT_BYTES = 1 << 24
_MAX_MESSAGE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Begun:
    """What an ingress holds of a request whose Head is gone, so that another one can go on with it."""

    drawn: tuple[int, ...]
    stopped: bool  # the answer ends with these
    node_nonce: bytes  # keys its noise
    times: int  # how often it has been resumed, this time counted

    def __post_init__(self) -> None:
        if not 1 <= self.times <= MAX_RESUMED or (self.stopped and not self.drawn):
            raise ProtocolError(f"a request resumed {self.times} times, where {MAX_RESUMED} are accepted, or not begun")


@dataclass(frozen=True, slots=True)
class Accepted:
    """The Head has taken the request in. node_nonce: its part of the noise key, for a Head that may have to go on."""

    id: RequestId
    node_nonce: bytes


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this request and tell me of it. begun: what another Head had done of it."""

    request: GenerationRequest
    begun: Begun | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """End this request. keep: its tokens so far count and are signed; else it is forgotten."""

    id: RequestId
    keep: bool


@dataclass(frozen=True, slots=True)
class AskStatus:
    """Tell me how the pipeline does."""


@dataclass(frozen=True, slots=True)
class Seek:
    """Tell me whether you hold a request, or what it came to, under this key (request.Once)."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Held:
    """Whether the Head does."""

    key: bytes
    here: bool


Call = Submit | Stop | AskStatus | Seek
Told = Event | Accepted | Held


@dataclass(frozen=True, slots=True)
class Status:
    """How the pipeline does, as GET /v1/cluster/state shows it."""

    facts: dict[str, Value]


def encode_call(call: Call) -> bytes:
    """The bytes of what an ingress says."""
    match call:
        case Submit(request, begun):
            return canonical.encode({"c": "submit", "r": request.encode(), "b": _begun_value(begun)})
        case Stop(id, keep):
            return canonical.encode({"c": "stop", "id": id, "keep": keep})
        case AskStatus():
            return canonical.encode({"c": "status"})
        case Seek(key):
            return canonical.encode({"c": "seek", "k": key})


def decode_call(data: bytes) -> Call:
    """Read encode_call's bytes. Raises ProtocolError."""
    try:
        with Fields(canonical.decode(data, max_bytes=MAX_MESSAGE_BYTES), "call") as f:
            kind = f.text("c", 10)
            if kind == "submit":
                return Submit(GenerationRequest.decode(f.data("r", 1, MAX_REQUEST_BYTES)), _begun(f.any("b")))
            if kind == "stop":
                return Stop(RequestId(f.text("id", 100)), f.boolean("keep"))
            if kind == "status":
                return AskStatus()
            if kind == "seek":
                return Seek(f.data("k", KEY_DIGEST_BYTES, KEY_DIGEST_BYTES))
            raise ProtocolError(f"a call of unknown kind {kind!r}")
    except FormatError as e:
        raise ProtocolError(f"not an ingress's call: {e}") from e


def _begun_value(begun: Begun | None) -> Value:
    if begun is None:
        return None
    return {"t": list(begun.drawn), "end": begun.stopped, "n": begun.node_nonce, "x": begun.times}


def _begun(value: Value) -> Begun | None:
    if value is None:
        return None
    with Fields(value, "begun") as f:
        drawn, stopped = f.integers("t", MAX_TOKENS, 0, MAX_VOCAB), f.boolean("end")
        return Begun(drawn, stopped, f.data("n", NONCE_BYTES, NONCE_BYTES), f.integer("x", 1, MAX_RESUMED))


def encode_events(events: list[Told], status: Status | None = None) -> bytes:
    """The bytes of what a Head tells one ingress after a step."""
    return canonical.encode({"ev": [_event_value(e) for e in events], "st": status.facts if status else None})


def decode_events(data: bytes) -> tuple[list[Told], Status | None]:
    """Read encode_events's bytes. Raises ProtocolError."""
    try:
        with Fields(canonical.decode(data, max_bytes=_MAX_RECEIPT_BYTES * 4), "events") as f:
            events = [_event(v) for v in f.items("ev", _MAX_EVENTS)]
            facts = f.any("st")
            if facts is not None and not isinstance(facts, dict):
                raise FormatError(f"a status that is no map but {type(facts).__name__}")
            return events, None if facts is None else Status(facts)
    except FormatError as e:
        raise ProtocolError(f"not a Head's events: {e}") from e


def _event_value(event: Told) -> Value:
    match event:
        case Held(key, here):
            return {"e": "held", "k": key, "y": here}
        case Accepted(id, nonce):
            return {"e": "in", "id": id, "n": nonce}
        case TokensEvent(id, tokens):
            return {"e": "tokens", "id": id, "t": list(tokens)}
        case FinishedEvent(id, reason, receipt):
            return {"e": "end", "id": id, "why": reason, "r": receipt}
        case FailedEvent(id, kind, message, evidence):
            # What cannot be written as UTF-8 must not silence the other requests' events in this message.
            said = message[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()
            return {"e": "fail", "id": id, "k": kind, "m": said, "s": evidence}


def _event(value: Value) -> Told:
    with Fields(value, "event") as f:
        kind = f.text("e", 10)
        if kind == "held":
            return Held(f.data("k", KEY_DIGEST_BYTES, KEY_DIGEST_BYTES), f.boolean("y"))
        id = RequestId(f.text("id", 100))
        if kind == "in":
            return Accepted(id, f.data("n", NONCE_BYTES, NONCE_BYTES))
        if kind == "tokens":
            return TokensEvent(id, f.integers("t", MAX_TOKENS, 0, MAX_VOCAB))
        if kind == "end":
            why = f.text("why", 20)
            if why not in ("stop", "length", "cancelled", "error"):
                raise FormatError(f"a finish reason {why!r}")
            return FinishedEvent(id, why, f.data("r", 0, _MAX_RECEIPT_BYTES))  # type: ignore[arg-type]
        if kind == "fail":
            what = f.text("k", 20)
            if what not in get_args(FailureKind):
                raise FormatError(f"a failure of kind {what!r}")
            return FailedEvent(id, what, f.text("m", _MAX_MESSAGE_CHARS), f.data("s", 0, 1 << 16))  # type: ignore[arg-type]
        raise FormatError(f"an event of unknown kind {kind!r}")
