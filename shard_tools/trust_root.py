"""A trust policy as a signed file, and how a newer one replaces it: keys rotate and are revoked without meeting again.

The first file is trusted because somebody handed it over. From then on a successor counts if it is the next version,
and signed by enough root keys of the one before *and* of its own: who holds too few of today's keys cannot say whose
are tomorrow's. A file that has expired is refused, so nobody can hold a successor back for ever.
Laws: `SignedTrustRoot.decode(s.encode()) == s`; `succeed` never accepts what is not the next version.
Source: The Update Framework, section 5.3. Pure but for `read_trust`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from shard_tools import canonical, signing
from shard_tools.canonical import Fields, Value
from shard_tools.errors import ExpiredError, FormatError, InputError, RollbackError, SignatureError
from shard_tools.signing import KEY_BYTES, SIGNATURE_BYTES, PublicKey, Signer, parse_key
from shard_tools.trust import MAX_KEYS, MAX_RULES, Rule, TrustPolicy

TRUST_TYPE = "application/vnd.llmd.trust.v1+dag-cbor"
MAX_TRUST_BYTES = 256 << 10  # 64 rules of 32 keys take 80 KB
MAX_REVOKED = 1024
_MAX_NUMBER = 1 << 53
_KEY_TEXT = b"llmd-ed25519:"


@dataclass(frozen=True, slots=True)
class TrustRoot:
    """A policy, its version, until when it holds, and the keys of which `threshold` must sign it and its successor."""

    version: int
    expires_s: int
    keys: frozenset[PublicKey]
    threshold: int
    policy: TrustPolicy

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= len(self.keys) <= MAX_KEYS:
            raise InputError(f"{self.threshold} of {len(self.keys)} root keys; 1 to {MAX_KEYS} can be")

    def encode(self) -> bytes:
        """The bytes that are signed."""
        rules: list[Value] = [[rule.names, rule.threshold, _listed(rule.keys)] for rule in self.policy.rules]
        return canonical.encode(
            {
                "version": self.version,
                "expires": self.expires_s,
                "root": {"keys": _listed(self.keys), "threshold": self.threshold},
                "rules": rules,
                "revoked": _listed(self.policy.revoked),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> TrustRoot:
        """Read what encode wrote. Raises FormatError."""
        try:
            with Fields(canonical.decode(data, max_bytes=MAX_TRUST_BYTES), "trust root") as f:
                with Fields(f.map("root"), "trust root.root") as r:
                    keys, threshold = _keys(r.items("keys", MAX_KEYS)), r.integer("threshold", 1, MAX_KEYS)
                rules = tuple(_rule(row) for row in f.items("rules", MAX_RULES))
                policy = TrustPolicy(rules, _keys(f.items("revoked", MAX_REVOKED)))
                root = cls(
                    f.integer("version", 1, _MAX_NUMBER), f.integer("expires", 0, _MAX_NUMBER), keys, threshold, policy
                )
        except InputError as e:
            raise FormatError(f"trust root: {e}") from e
        if root.encode() != data:
            raise FormatError("a trust root lists its keys in another order, or twice")
        return root

    def check_fresh(self, now_s: int) -> None:
        """Returns if it has not expired. Raises ExpiredError."""
        if now_s >= self.expires_s:
            day = time.strftime("%Y-%m-%d", time.gmtime(self.expires_s))
            raise ExpiredError(
                f"version {self.version} of the trust root expired on {day}: get the next one from whoever gave you "
                f"this, and run `llmd trust update`"
            )


@dataclass(frozen=True, slots=True)
class SignedTrustRoot:
    """A root and who signed it, sorted by key. Nothing is checked until `accept` or `succeed`."""

    root: TrustRoot
    signatures: tuple[tuple[PublicKey, bytes], ...] = ()

    def signed_also_by(self, signer: Signer) -> SignedTrustRoot:
        """The same root with this signature too."""
        rows = dict(self.signatures) | {signer.public: signer.sign(TRUST_TYPE, self.root.encode())}
        return replace(self, signatures=tuple(sorted(rows.items())))

    def accept(self) -> TrustRoot:
        """The root, as the first one, handed over by hand: enough of its own keys signed it. Raises SignatureError."""
        self._check(self.root, "its own")
        return self.root

    def succeed(self, current: TrustRoot) -> TrustRoot:
        """The root, as the successor of `current`. Raises RollbackError, SignatureError."""
        if self.root.version != current.version + 1:
            raise RollbackError(
                f"this is version {self.root.version} of the trust root, and version {current.version + 1} comes next: "
                f"successors are taken one by one, none is left out and none comes twice"
            )
        self._check(current, "today's")
        self._check(self.root, "its own")
        return self.root

    def encode(self) -> bytes:
        rows: list[Value] = [{"key": key, "sig": signature} for key, signature in self.signatures]
        return canonical.encode({"v": 1, "root": self.root.encode(), "sigs": rows})

    @classmethod
    def decode(cls, data: bytes) -> SignedTrustRoot:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_TRUST_BYTES), "signed trust root") as f:
            f.integer("v", 1, 1)
            rows = tuple(_row(item) for item in f.items("sigs", 2 * MAX_KEYS))
            signed = cls(TrustRoot.decode(f.data("root", 1, MAX_TRUST_BYTES)), rows)
        if list(rows) != sorted(dict(rows).items()):
            raise FormatError("the signatures are not sorted by key, or a key signs twice")
        return signed

    def _check(self, by: TrustRoot, whose: str) -> None:
        statement, right = self.root.encode(), 0
        for key, signature in self.signatures:
            if key in by.keys:
                signing.verify(key, TRUST_TYPE, statement, signature)
                right += 1
        if right < by.threshold:
            raise SignatureError(
                f"version {self.root.version} of the trust root is signed by {right} of {whose} {len(by.keys)} root "
                f"keys; {by.threshold} must. They sign it with `llmd trust sign`."
            )


def read_trust(entries: Iterable[str], now_s: int) -> TrustPolicy:
    """The policy that a person's list of trust means: public keys, files of one, or the file of one trust root.

    Raises InputError for what cannot be read, and what a trust root that does not hold raises.
    """
    keys: list[PublicKey] = []
    roots: list[TrustRoot] = []
    for entry in entries:
        if entry.startswith(_KEY_TEXT.decode()):
            keys.append(parse_key(entry))
            continue
        try:
            with Path(entry).expanduser().open("rb") as f:
                data = f.read(MAX_TRUST_BYTES + 1)
        except OSError as e:
            raise InputError(f"{entry[:80]!r} is not a public key, and no file of one: {e.strerror}") from e
        if data.startswith(_KEY_TEXT):
            keys.append(parse_key(data[:200].decode("ascii", "replace")))
        else:
            roots.append(SignedTrustRoot.decode(data).accept())
    if not roots:
        return TrustPolicy.any_of(keys)
    if keys or len(roots) > 1:
        raise InputError("a trust root says all there is to say: name it alone, without keys and other roots")
    roots[0].check_fresh(now_s)
    return roots[0].policy


def _listed(keys: frozenset[PublicKey]) -> list[Value]:
    return list(sorted(keys))


def _keys(items: list[Value]) -> frozenset[PublicKey]:
    keys = [PublicKey(item) for item in items if isinstance(item, bytes) and len(item) == KEY_BYTES]
    if len(keys) != len(items):
        raise FormatError("trust root: a key is not 32 bytes")
    return frozenset(keys)


def _rule(row: Value) -> Rule:
    match row:
        case [str(names), int(threshold), list(keys)]:
            return Rule(names, _keys(keys), threshold)
    raise FormatError(f"trust root.rules: {str(row)[:100]} is no rule")


def _row(item: Value) -> tuple[PublicKey, bytes]:
    with Fields(item, "signed trust root.sigs") as f:
        return PublicKey(f.data("key", KEY_BYTES, KEY_BYTES)), f.data("sig", SIGNATURE_BYTES, SIGNATURE_BYTES)
