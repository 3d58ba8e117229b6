"""A session is somebody's word for a while, and a registry is the operator's list for a while."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.errors import ReceiptError
from serve_app.receipts.identity import CLOCK_SKEW_S, Certificate, NodeIdentity, RegisteredNode, Registry
from shard_tools.errors import InputError, SignatureError
from shard_tools.signing import PublicKey, Signer

NOW_S = 1_790_000_000
OPERATOR = Signer.from_seed(bytes(32))
NODE = NodeIdentity(Signer.from_seed(bytes([1]) * 32))
REGISTRY = Registry.of([RegisteredNode(NODE.key, "host")], 3, NOW_S, 1000)


def test_registry_round_trips_while_it_is_valid() -> None:
    """open(seal(r)) == r from issued_at (less the skew) until just before expires_at."""
    sealed = REGISTRY.seal(OPERATOR)
    for now_s in (NOW_S - CLOCK_SKEW_S, NOW_S, NOW_S + 999):
        assert Registry.open(sealed, OPERATOR.public, now_s) == REGISTRY
    for now_s, match in ((NOW_S + 1000, "expired"), (NOW_S - CLOCK_SKEW_S - 1, "begins")):
        with pytest.raises(ReceiptError, match=match):
            Registry.open(sealed, OPERATOR.public, now_s)
    with pytest.raises(SignatureError, match="not the operator"):
        Registry.open(sealed, frozenset((NODE.key,)), NOW_S)


def test_a_registry_lists_each_key_once_in_order() -> None:
    """One list has one form, whatever the order of its entries when it was made."""
    nodes = [RegisteredNode(PublicKey(bytes([i]) * 32), f"n{i}") for i in (2, 0, 1)]
    assert Registry.of(nodes, 0, 0, 1) == Registry.of(nodes[::-1], 0, 0, 1)
    with pytest.raises(ReceiptError, match="sorted"):
        Registry(0, 0, 1, tuple(nodes))
    with pytest.raises(ReceiptError, match="twice"):
        Registry.of([nodes[0], nodes[0]], 0, 0, 1)
    with pytest.raises(ReceiptError, match="expires"):
        replace(REGISTRY, expires_at=NOW_S)


def test_a_session_is_certified_for_one_role_and_time() -> None:
    """Its certificate opens for that role while it lasts; each session has a key of its own."""
    session = NODE.open_session("stage", 5, NOW_S, 60)
    terms = Certificate.open(session.certificate, REGISTRY, "stage", NOW_S + 59)
    assert (terms.node, terms.session, terms.epoch) == (NODE.key, session.key, 5)
    assert terms == session.terms
    with pytest.raises(ReceiptError, match="role stage"):
        Certificate.open(session.certificate, REGISTRY, "head", NOW_S)
    with pytest.raises(ReceiptError, match="expired"):
        Certificate.open(session.certificate, REGISTRY, "stage", NOW_S + 60)
    with pytest.raises(ReceiptError, match="not in registry version 0"):
        Certificate.open(session.certificate, Registry(0, 0, 1, ()), "stage", NOW_S)
    assert NODE.open_session("stage", 5, NOW_S, 60).key != session.key


def test_identity_file_is_private_and_stays_the_same(tmp_path: Path) -> None:
    """Made once with mode 0600, read ever after; refused if others may read it."""
    path = tmp_path / "state" / "node.pem"
    key = NodeIdentity.load_or_create(path).key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert NodeIdentity.load_or_create(path).key == key
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        NodeIdentity.load_or_create(path)
