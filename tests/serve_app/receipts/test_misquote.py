"""A receipt that contradicts the statement it names, and what that proves of its Head."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ReceiptError
from serve_app.receipts.misquote import Misquote, decode_proof
from serve_app.receipts.rows import ids_root
from serve_app.receipts.statement import envelope_cid
from shard_tools.errors import LlmdError, SignatureError
from tests.serve_app.receipts.pipeline_of_three import MANIFEST, Cluster, a_request
from tests.serve_app.receipts.test_check import CLUSTER, HONEST, resign
from tests.serve_app.receipts.test_equivocation import a_fork

LIE = resign(HONEST, out_ids=(40, 41, 3), out_root=ids_root(MANIFEST, (40, 41, 3), 4))
PROOF = Misquote.of(LIE)


def test_an_honest_receipt_proves_nothing_and_another_token_convicts_the_head() -> None:
    assert Misquote.of(HONEST) is None and PROOF is not None
    assert PROOF.convicted() == CLUSTER.nodes[0].key and decode_proof(PROOF.encode()) == PROOF


def test_nobody_is_convicted_by_what_he_did_not_sign_or_did_not_name() -> None:
    assert PROOF is not None
    other = Cluster(seed=b"other").bundle(a_request(), (40, 41, 3))
    for changes in (
        {"receipt": dataclasses.replace(PROOF.receipt, signature=bytes(64))},
        {"statement": dataclasses.replace(PROOF.statement, signature=bytes(64))},
        {"head": dataclasses.replace(PROOF.head, signature=bytes(64))},
        {"head": CLUSTER.session(1, "head").certificate},
        {"stage": CLUSTER.stages[1].certificate},
    ):
        with pytest.raises(SignatureError):
            dataclasses.replace(PROOF, **changes).convicted()
    with pytest.raises(ReceiptError, match="role"):
        dataclasses.replace(PROOF, head=PROOF.stage).convicted()
    for receipt, statement in (
        (HONEST.receipt, HONEST.statements[2]),  # they agree
        (LIE.receipt, HONEST.statements[1]),  # not the last
    ):
        with pytest.raises((ReceiptError, SignatureError)):
            dataclasses.replace(PROOF, receipt=receipt, statement=statement).convicted()
    unnamed = resign(LIE, statements=tuple(envelope_cid(e) for e in other.statements), out_ids=(40, 41, 3))
    assert Misquote.of(unnamed) is None


def test_proofs_of_both_kinds_are_told_apart() -> None:
    from serve_app.receipts.equivocation import Equivocation

    proof = Equivocation.of(CLUSTER.stages[1].certificate, *a_fork())
    assert proof is not None and decode_proof(proof.encode()) == proof


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(at: int, to: int) -> None:
    assert PROOF is not None
    data = bytearray(PROOF.encode())
    data[at % len(data)] = to
    try:
        assert decode_proof(bytes(data)).convicted() == CLUSTER.nodes[0].key and data == PROOF.encode()
    except LlmdError:
        pass
