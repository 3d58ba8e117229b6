"""A signed policy, and its successors: keys rotate and are revoked, and nobody skips, forges or holds back one."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from shard_tools.errors import ExpiredError, FormatError, InputError, LlmdError, RollbackError, SignatureError
from shard_tools.signing import Signer, key_text
from shard_tools.trust import Rule, TrustPolicy
from shard_tools.trust_cli import register
from shard_tools.trust_root import SignedTrustRoot, TrustRoot, read_trust

A, B, C, PUBLISHER = (Signer.from_seed(bytes([i]) * 32) for i in (1, 2, 3, 4))
POLICY = TrustPolicy((Rule("*", frozenset([PUBLISHER.public]), 1),))
NOW = 1_800_000_000


def root(version: int, *keys: Signer, threshold: int = 1, policy: TrustPolicy = POLICY) -> TrustRoot:
    return TrustRoot(version, NOW + 1000, frozenset(key.public for key in keys), threshold, policy)


def signed(root: TrustRoot, *signers: Signer) -> SignedTrustRoot:
    out = SignedTrustRoot(root)
    for signer in signers:
        out = out.signed_also_by(signer)
    return out


def test_it_is_read_as_it_was_written() -> None:
    one = signed(root(3, A, B, threshold=2, policy=TrustPolicy(POLICY.rules, frozenset([C.public]))), A, B)
    assert SignedTrustRoot.decode(one.encode()) == one


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    block = bytearray(signed(root(1, A), A).encode())
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(LlmdError):
        SignedTrustRoot.decode(bytes(block)).accept()


def test_the_first_needs_enough_of_its_own_keys() -> None:
    assert signed(root(1, A, B, threshold=2), A, B).accept().version == 1
    with pytest.raises(SignatureError, match="signed by 1 of its own 2 root keys; 2 must"):
        signed(root(1, A, B, threshold=2), A, C).accept()


def test_a_successor_needs_todays_keys_and_its_own() -> None:
    today = root(1, A, B, threshold=2)
    tomorrow = root(2, B, C, threshold=2)
    assert signed(tomorrow, A, B, C).succeed(today) == tomorrow
    with pytest.raises(SignatureError, match="today's"):
        signed(tomorrow, B, C).succeed(today)
    with pytest.raises(SignatureError, match="its own"):
        signed(tomorrow, A, B).succeed(today)


@pytest.mark.parametrize("version", [1, 3, 4, 9])
def test_none_is_left_out_and_none_comes_twice(version: int) -> None:
    with pytest.raises(RollbackError, match="and version 5 comes next"):
        signed(root(version, A), A).succeed(root(4, A))


def test_a_list_of_trust_is_keys_or_files_of_keys_or_one_root(tmp_path: Path) -> None:
    public, policy = tmp_path / "a.pub", tmp_path / "trust"
    public.write_text(key_text(A.public) + "\n")
    policy.write_bytes(signed(root(1, A), A).encode())
    assert read_trust([str(public), key_text(B.public)], NOW).publishers_of("m") == {A.public, B.public}
    assert read_trust([str(policy)], NOW) == POLICY
    with pytest.raises(ExpiredError, match="llmd trust update"):
        read_trust([str(policy)], NOW + 1000)
    with pytest.raises(InputError, match="name it alone"):
        read_trust([str(policy), str(public)], NOW)
    with pytest.raises(InputError, match="not a public key"):
        read_trust([str(tmp_path / "absent")], NOW)
    policy.write_bytes(SignedTrustRoot(root(1, A)).encode())
    with pytest.raises(SignatureError):
        read_trust([str(policy)], NOW)
    policy.write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError):
        read_trust([str(policy)], NOW)


def test_the_commands_rotate_a_root_and_revoke_a_publisher(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)

    def run(*words: object, key: str = "a") -> Result:
        environment = {"LLMD_KEY": str(tmp_path / f"{key}.pem")}
        return CliRunner().invoke(app, [str(word) for word in words], env=environment)

    def public(name: str) -> str:
        return key_text(Signer.load_or_create(tmp_path / f"{name}.pem").public)

    one, two = tmp_path / "1.trust", tmp_path / "2.trust"
    rule = f"org/*:2={public('p')},{public('q')}"
    assert run("trust", "new", one, "--rule", rule, "--root", public("a")).exit_code == 0
    assert "0 of its own" in run("trust", "show", one).stderr
    assert run("trust", "sign", one).exit_code == 0
    shown = run("trust", "show", one).stdout
    assert "org/*: 2 of" in shown and "Enough" in shown
    again = ("trust", "new", two, "--after", one, "--rule", f"*={public('q')}", "--root", public("b"))
    assert run(*again, "--revoke", public("p")).exit_code == 0
    assert run("trust", "sign", two, key="b").exit_code == 0
    assert "today's" in run("trust", "update", one, two).stderr
    assert run("trust", "sign", two, key="a").exit_code == 0
    assert "now version 2" in run("trust", "update", one, two).stdout
    assert f"revoked: {public('p')}" in run("trust", "show", one).stdout
    assert "comes next" in run("trust", "update", one, two).stderr
    assert "expected NAMES" in run("trust", "new", two, "--rule", "x", "--root", public("a")).stderr
    assert "cannot read" in run("trust", "sign", tmp_path / "absent").stderr
