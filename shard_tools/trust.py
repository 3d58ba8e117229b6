"""Whose word counts for which names: publishers, how many of them must agree, and whose keys count no more.

Pure: who gave the policy, and whether a newer one is accepted, is trust_root.py's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shard_tools.errors import InputError, SignatureError
from shard_tools.signing import PublicKey, key_text

MAX_RULES = 64
MAX_KEYS = 32  # of one rule; as many as a release has signers

_PATTERN = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,95}))?")


@dataclass(frozen=True, slots=True)
class Rule:
    """Any `threshold` of these keys publish the names of this pattern: a name, `org/*`, or `*` for all."""

    names: str
    keys: frozenset[PublicKey]
    threshold: int

    def __post_init__(self) -> None:
        if not _PATTERN.fullmatch(self.names):
            raise InputError(f"{self.names[:80]!r} is no pattern of names: expected a name, org/* or *")
        if not 1 <= self.threshold <= len(self.keys) <= MAX_KEYS:
            raise InputError(
                f"{self.threshold} of {len(self.keys)} keys for {self.names!r}: 1 to {MAX_KEYS} are possible"
            )

    def covers(self, name: str) -> bool:
        """Whether the rule is about this name."""
        if self.names == "*":
            return True
        return name.startswith(self.names[:-1]) if self.names.endswith("/*") else name == self.names


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """The first rule that covers a name decides; a name that none covers has no publisher. revoked: count nowhere."""

    rules: tuple[Rule, ...]
    revoked: frozenset[PublicKey] = frozenset()

    @classmethod
    def any_of(cls, keys: Iterable[PublicKey]) -> TrustPolicy:
        """Each of these keys alone may publish any name; without a key nobody may."""
        keys = frozenset(keys)
        return cls((Rule("*", keys, 1),) if keys else ())

    def publishers_of(self, name: str) -> frozenset[PublicKey]:
        """The keys that count for this name."""
        rule = self._rule(name)
        return frozenset() if rule is None else rule.keys - self.revoked

    def check(self, name: str, signers: frozenset[PublicKey]) -> None:
        """Returns if enough of the signers, whose signatures are right, count for this name. Raises SignatureError."""
        rule = self._rule(name)
        counting = signers & self.publishers_of(name)
        if rule is not None and len(counting) >= rule.threshold:
            return
        said = ", ".join(key_text(key) for key in sorted(signers)) or "nobody"
        revoked = ", ".join(key_text(key) for key in sorted(signers & self.revoked))
        needed = "which no rule of the policy covers" if rule is None else f"of whom {len(counting)} count"
        wanted = f"; {rule.threshold} must" if rule is not None and rule.threshold > 1 else ""
        raise SignatureError(
            f"{name} is signed by {said}, {needed}{wanted}: not by a trusted publisher."
            + (f" Revoked: {revoked}." if revoked else " If you trust them, pass that key as trusted.")
        )

    def _rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.covers(name)), None)
