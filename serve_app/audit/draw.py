"""Which requests are audited, which stage of each, and by whom: known to nobody before the rows are signed for.

The draw is a hash of the receipt, a secret that the drawer committed to before, and a log head that came after:

    draw = SHA-256("llmd.draw.v1" 00 || receipt CID || secret || next log head)

A stage cannot know it while it computes (the receipt names its own signed roots, and the secret is one), and who
knows the secret cannot choose it: it was committed to, and the log head is not theirs. Anybody repeats the draw once
the secret is told. Pure: hashes in, choices out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.errors import AuditError
from shard_tools.cid import Cid
from shard_tools.signing import PublicKey

MICRO = 10**6
SECRET_BYTES = 32
_COMMIT_TAG, _DRAW_TAG = b"llmd.draw.commit.v1\0", b"llmd.draw.v1\0"


@dataclass(frozen=True, slots=True)
class Draw:
    """32 bytes, from which everything about the audit of one receipt follows."""

    value: bytes

    def audits(self, rate_micro: int) -> bool:
        """Whether the request is audited at all. rate_micro: of a million requests, how many."""
        return self._number(b"audit", MICRO) < rate_micro

    def stage(self, n_stages: int) -> int:
        """The stage that is replayed."""
        return self._number(b"stage", n_stages)

    def auditors(
        self, candidates: Sequence[tuple[PublicKey, str]], judged_owner: str, count: int
    ) -> tuple[PublicKey, ...]:
        """`count` auditors of different owners, none of the owner that is judged. candidates: (node key, owner).

        Raises AuditError if there are not so many.
        """
        chosen: dict[str, PublicKey] = {judged_owner: PublicKey(b"")}
        for key, owner in sorted(candidates, key=lambda c: hmac.digest(self.value, b"auditor" + c[0], "sha256")):
            if owner not in chosen:
                chosen[owner] = key
            if len(chosen) > count:
                break
        keys = tuple(chosen.values())[1:]
        if len(keys) < count:
            raise AuditError(f"{count} auditors of different owners are wanted, {len(keys)} are there")
        return keys

    def _number(self, what: bytes, below: int) -> int:
        # 128 bits modulo a small number: no choice is likelier than another by more than 2^-64.
        assert 0 < below < 1 << 64
        return int.from_bytes(hmac.digest(self.value, what, "sha256")[:16], "big") % below


def secret_commitment(secret: bytes) -> bytes:
    """32 bytes to publish before the requests come."""
    assert len(secret) == SECRET_BYTES
    return hashlib.sha256(_COMMIT_TAG + secret).digest()


def draw(receipt: Cid, secret: bytes, committed: bytes, log_head: bytes) -> Draw:
    """The draw for this receipt. log_head: the root of the first tree head after the receipt's own entry.

    Raises AuditError for another secret than was committed to.
    """
    if len(secret) != SECRET_BYTES or secret_commitment(secret) != committed:
        raise AuditError("this secret is not the one that was committed to before: who tells it chose the draw")
    assert len(log_head) == 32
    return Draw(hashlib.sha256(_DRAW_TAG + bytes(receipt) + secret + log_head).digest())
