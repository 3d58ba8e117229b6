"""Two statements of one session, and what they prove of its node."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ReceiptError
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.statement import StatementChain
from shard_tools.errors import LlmdError, SignatureError
from shard_tools.signing import Envelope
from tests.serve_app.receipts.pipeline_of_three import Cluster, a_request

CLUSTER = Cluster()
STAGE, NODE = CLUSTER.stages[1], CLUSTER.nodes[1].key
SAID = CLUSTER.statements(a_request())[1]


def numbers(count: int, chain: StatementChain | None = None) -> list[Envelope]:
    """The first statements of a chain, no two with the same rows."""
    chain = chain or StatementChain(STAGE)
    return [chain.sign(dataclasses.replace(SAID, out_root=bytes([i]) * 32)) for i in range(count)]


def a_fork() -> tuple[Envelope, Envelope]:
    """The second statement of one story, and that of another which began in the same way."""
    (first, second), other = numbers(2), StatementChain(STAGE)
    assert other.sign(dataclasses.replace(SAID, out_root=bytes(32))) == first
    return second, other.sign(dataclasses.replace(SAID, out_root=b"x" * 32))


def test_an_honest_chain_proves_nothing() -> None:
    for one in (said := numbers(4)):
        assert all(Equivocation.of(STAGE.certificate, one, other) is None for other in said)


def test_two_statements_of_one_number_convict_the_node_in_whatever_order_they_came() -> None:
    one, other = a_fork()
    proof = Equivocation.of(STAGE.certificate, one, other)
    assert proof is not None and proof == Equivocation.of(STAGE.certificate, other, one)
    assert proof.convicted() == NODE
    assert Equivocation.decode(proof.encode()) == proof


def test_a_later_statement_that_names_another_before_it_convicts_the_node() -> None:
    second, _ = a_fork()
    chain = StatementChain(STAGE)
    chain.sign(dataclasses.replace(SAID, out_root=b"y" * 32))
    chain.sign(SAID)
    third = chain.sign(SAID)
    proof = Equivocation.of(STAGE.certificate, third, second)
    assert proof is not None and proof.convicted() == NODE and proof.first == second


def test_nobody_is_convicted_by_another_nodes_words_or_by_forged_ones() -> None:
    one, other = a_fork()
    forged = dataclasses.replace(other, signature=bytes(64))
    with pytest.raises(SignatureError):
        Equivocation(STAGE.certificate, one, forged).convicted()
    with pytest.raises(SignatureError):
        Equivocation(CLUSTER.stages[0].certificate, one, other).convicted()
    lent = dataclasses.replace(STAGE.certificate, key=CLUSTER.nodes[0].key)
    with pytest.raises(SignatureError):
        Equivocation(lent, one, other).convicted()
    with pytest.raises(ReceiptError, match="agree"):
        Equivocation(STAGE.certificate, *numbers(2)).convicted()
    receipt = STAGE.seal("application/vnd.llmd.receipt.v1+dag-cbor", one.payload)
    with pytest.raises(SignatureError):
        Equivocation(STAGE.certificate, other, receipt).convicted()


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(at: int, to: int) -> None:
    proof = Equivocation.of(STAGE.certificate, *a_fork())
    assert proof is not None
    data = bytearray(proof.encode())
    data[at % len(data)] = to
    try:
        assert Equivocation.decode(bytes(data)).convicted() == NODE and data == proof.encode()
    except LlmdError:
        pass
