"""The log proves what is in it and that it only grew, and nothing else can be proved of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ReceiptError
from serve_app.receipts.log import Log, TreeHead, require_grown, require_included
from shard_tools.errors import SignatureError
from shard_tools.signing import Envelope, Signer


def entry(i: int) -> bytes:
    return b"entry %d" % i


def log_of(size: int, base: int = 0) -> Log:
    log = Log()
    for i in range(size):
        assert log.append(entry(base + i)) == i
    return log


def naive(entries: list[bytes]) -> bytes:
    """RFC 9162, 2.1.1, as it is written."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    k = 1
    while 2 * k < len(entries):
        k *= 2
    return hashlib.sha256(b"\1" + naive(entries[:k]) + naive(entries[k:])).digest()


SIZE = 67
LOG = log_of(SIZE)
HEADS = [TreeHead(n, naive([entry(i) for i in range(n)]), 0) for n in range(SIZE + 1)]


def test_roots_are_those_of_the_definition() -> None:
    """For every size, also asked of a log that has grown since."""
    for n, head in enumerate(HEADS):
        assert LOG.root(n) == head.root == log_of(n).root()


def test_every_entry_is_proved_in_every_log_that_has_it() -> None:
    """All pairs of index and size; and at no other place, in no other log."""
    for n in range(1, SIZE + 1):
        for i in range(n):
            proof = LOG.inclusion(i, n)
            require_included(entry(i), i, HEADS[n], proof)
            with pytest.raises(ReceiptError):
                require_included(entry(i + 1), i, HEADS[n], proof)
            with pytest.raises(ReceiptError):
                require_included(entry(i), i + 1, HEADS[n], proof)
            with pytest.raises(ReceiptError):
                require_included(entry(i), i, HEADS[n - 1], proof)


def test_every_growth_is_proved_and_no_rewriting() -> None:
    """All pairs of sizes; a log of other entries is no continuation, nor does one shrink."""
    other = log_of(SIZE, base=1)
    for old in range(1, SIZE + 1):
        for new in range(old, SIZE + 1):
            proof = LOG.consistency(old, new)
            require_grown(HEADS[old], HEADS[new], proof)
            with pytest.raises(ReceiptError):
                require_grown(HEADS[old], TreeHead(new, other.root(new), 0), other.consistency(old, new))
            if new > old:
                with pytest.raises(ReceiptError, match="shrank"):
                    require_grown(HEADS[new], HEADS[old], proof)
    require_grown(HEADS[0], HEADS[5], ())


@given(st.integers(1, SIZE), st.integers(0, 200), st.data())
def test_an_altered_proof_proves_nothing(size: int, seed: int, data: st.DataObject) -> None:
    """One bit flipped, one hash left out, doubled or added."""
    index, old = seed % size, 1 + seed % size
    for proof, check in (
        (LOG.inclusion(index, size), lambda p: require_included(entry(index), index, HEADS[size], p)),
        (LOG.consistency(old, size), lambda p: require_grown(HEADS[old], HEADS[size], p)),
    ):
        changed = list(proof)
        if changed and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(changed) - 1))
            flipped = bytearray(changed[at])
            flipped[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
            changed[at : at + 1] = data.draw(st.sampled_from([[bytes(flipped)], [], [changed[at]] * 2]))
        else:
            changed.append(data.draw(st.binary(min_size=32, max_size=32)))
        with pytest.raises(ReceiptError):
            check(changed)


@given(st.lists(st.binary(max_size=40), max_size=100), st.integers(-5, 1 << 50), st.integers(-5, 1 << 50))
def test_nonsense_is_refused_in_bounded_time(proof: list[bytes], index: int, size: int) -> None:
    """Whatever is claimed: ReceiptError."""
    head = TreeHead(size, bytes(32), 0)
    with pytest.raises(ReceiptError):
        require_included(b"", index, head, proof)
    with pytest.raises(ReceiptError):
        require_grown(TreeHead(index, bytes(range(32)), 0), head, proof)


def test_a_head_is_signed_by_its_log_and_as_nothing_else() -> None:
    """open(seal(h)) == h; another key or another payload type is refused."""
    log, other = Signer.from_seed(bytes(32)), Signer.from_seed(b"o" * 32)
    head = LOG.head(1_790_000_000_000)
    assert TreeHead.open(head.seal(log), log.public) == head
    with pytest.raises(SignatureError):
        TreeHead.open(head.seal(other), log.public)
    with pytest.raises(SignatureError):
        TreeHead.open(replace(head.seal(log), payload_type="application/vnd.llmd.receipt.v1+dag-cbor"), log.public)
    forged = Envelope.seal(other, head.seal(log).payload_type, head.seal(log).payload)
    with pytest.raises(SignatureError):
        TreeHead.open(replace(forged, key=log.public), log.public)
