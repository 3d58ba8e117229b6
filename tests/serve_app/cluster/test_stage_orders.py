"""What a controller and a stage of another operator say to each other, as bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serve_app.cluster.stage_orders import (
    MAX_BYTES,
    ComputesFastIn,
    Connect,
    Listen,
    Order,
    Ping,
    Ready,
    Take,
    Taken,
    TellTrouble,
    answer,
    decode_order,
    encode_order,
    read_answer,
    read_facts,
    read_gone,
    read_port,
    refusal,
)
from serve_app.cluster.wiring import Awaited, Joint
from serve_app.engine.engine import EngineProfile
from serve_app.errors import PipelineError, ProtocolError
from serve_app.receipts.identity import NodeIdentity
from serve_app.transport.handshake import EdgeAddress, Peer
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError
from shard_tools.signing import Signer

KEY = Signer.from_seed(bytes(32)).public
MODEL, SIGNATURE = (Cid.of(Codec.DAG_CBOR, word) for word in (b"model", b"signature"))
TAKE = Take(7, 1, 2, 2, 4, MODEL, SIGNATURE, "float32", 16, False, "auto", 3600)
HEAD = Joint("stage 1 > the head (7)", "tcp", Peer("the head", KEY, 0), EdgeAddress(None, "10.0.0.1", 4000), None)
ORDERS: list[Order] = [
    Ready(),
    Ping(),
    ComputesFastIn("bfloat16"),
    TAKE,
    Listen(7, (Awaited("stage 0 > stage 1 (7)", "tcp", Peer("stage 0", KEY, 0)),)),
    Connect(7, HEAD, None, 100, 64),
    Connect(7, HEAD, HEAD, 100, 64),
    Listen(7, (Awaited("stage 0 > stage 1 (7)", "tcp", Peer("stage 0", KEY, 0), True),)),
    Connect(7, HEAD, replace(HEAD, signed=True), 100, 64),
    TellTrouble(7),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: type(o).__name__)
def test_an_order_comes_back_from_its_bytes(order: Order) -> None:
    assert decode_order(encode_order(order)) == order


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 2}, "v: 2 is not in"),
        ({"do": "exec"}, "called 'exec'"),
        ({"do": 5}, "expected str"),
        ({"store": "/etc"}, "unknown field 'store'"),
        ({"engine": "mine"}, "unknown field 'engine'"),
        ({"stage": 2}, "stage 2 of 2"),
        ({"start": 4}, "no stage of any pipeline"),
        ({"stop": 10_001}, "stop: 10001"),
        ({"page_size": 0}, "page_size: 0"),
        ({"dtype": "float8"}, "'float8', expected one of float32"),
        ({"manifest": "bafy"}, "expected Cid"),
        ({"deterministic": 1}, "expected bool"),
        ({"lifetime_s": 1 << 40}, "lifetime_s"),
        ({"epoch": -1}, "epoch: -1"),
    ],
)
def test_what_is_no_order_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    fields = canonical.decode(encode_order(TAKE), max_bytes=MAX_BYTES)
    assert isinstance(fields, dict)
    with pytest.raises(ProtocolError, match=said.replace("(", r"\(")):
        decode_order(canonical.encode(fields | change))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04.", encode_order(TAKE)[:-1], encode_order(TAKE) + b"\0", bytes(70_000)]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_order(data)


def test_an_answer_comes_back_or_says_why_not() -> None:
    certificate = NodeIdentity(Signer.fresh()).open_session("stage", 7, 1000, 60).certificate
    profile = EngineProfile("torch", "cpu", "float32", 64, 1000, 4096, 0)
    taken = Taken(profile, certificate, 12, 30, 500)
    assert Taken.from_value(read_answer(answer(taken.to_value()), "it")) == taken
    with pytest.raises(PipelineError, match="it refuses: no such layers"):
        read_answer(refusal("no such layers"), "it")
    with pytest.raises(PipelineError, match=r"x{1000}$"):
        read_answer(refusal("x" * 100_000), "it")
    with pytest.raises(ProtocolError):
        read_answer(b"\x80\x04.", "it")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (read_port, {"port": 0}),
        (read_port, {"port": 65_536}),
        (read_port, {}),
        (read_gone, {"gone": ["a", "a"]}),
        (read_gone, {"gone": [1]}),
        (read_gone, {"gone": ["a"] * 1000}),
        (read_gone, {"gone": ["x" * 1000]}),
        (read_facts, {"pid": 1}),
        (Taken.from_value, {"profile": {}}),
    ],
)
def test_an_answer_that_cannot_be_is_refused(read: Any, value: Any) -> None:
    """Whatever a stage says is bounded, and has the fields it may have."""
    with pytest.raises(FormatError):
        read(value)
