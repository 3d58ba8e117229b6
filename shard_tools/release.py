"""What publishers sign: this name means this manifest, as this version, until this day. A block beside the manifest.

DSSE over the statement's bytes; detached, so the manifest's CID does not depend on who signs, or when. Version and
expiry are what an index cannot take away: one that answers with an old release is caught by whoever saw a newer one,
and one that answers with it for ever by the clock.
Law: `SignedRelease.decode(s.encode()) == s`. Source of the idea: The Update Framework, section 5.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from shard_tools import canonical, signing
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import ExpiredError, FormatError, SignatureError
from shard_tools.signing import KEY_BYTES, SIGNATURE_BYTES, PublicKey, Signer
from shard_tools.trust import TrustPolicy

RELEASE_TYPE = "application/vnd.llmd.release.v1+dag-cbor"
MAX_SIGNATURE_BYTES = 8 << 10
MAX_STATEMENT_BYTES = 1 << 10
MAX_SIGNERS = 32
MAX_VERSION = 1 << 53
LIFETIME_S = 365 * 86400  # TUF's roots hold as long; shorter is safer, where somebody is there to sign anew


@dataclass(frozen=True, slots=True)
class Release:
    """One version of what a name means. expires_s: seconds since 1970, from which on nobody should take it."""

    name: str
    version: int
    expires_s: int
    manifest: Cid

    def encode(self) -> bytes:
        """The bytes that are signed."""
        return canonical.encode(
            {"name": self.name, "version": self.version, "expires": self.expires_s, "manifest": self.manifest}
        )

    @classmethod
    def decode(cls, data: bytes) -> Release:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_STATEMENT_BYTES), "release") as f:
            return cls(
                f.text("name", 200),
                f.integer("version", 1, MAX_VERSION),
                f.integer("expires", 0, MAX_VERSION),
                f.link("manifest"),
            )

    def check_fresh(self, now_s: int) -> None:
        """Returns if it has not expired. Raises ExpiredError."""
        if now_s >= self.expires_s:
            day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires_s))
            raise ExpiredError(
                f"release {self.version} of {self.name} expired on {day}. Its publisher signs it anew with `llmd renew "
                f"{self.name}`; or is this machine's clock wrong?"
            )


@dataclass(frozen=True, slots=True)
class SignedRelease:
    """A release and who signed it, sorted by key. Nothing is checked until `check`."""

    release: Release
    signatures: tuple[tuple[PublicKey, bytes], ...]

    @classmethod
    def sign(cls, release: Release, *signers: Signer) -> SignedRelease:
        """Signed by each signer. Equal keys and releases give equal bytes."""
        statement = release.encode()
        return cls(release, tuple(sorted((s.public, s.sign(RELEASE_TYPE, statement)) for s in signers)))

    def signed_also_by(self, signer: Signer) -> SignedRelease:
        """The same release with this signature too. Raises SignatureError if there would be too many."""
        rows = dict(self.signatures) | {signer.public: signer.sign(RELEASE_TYPE, self.release.encode())}
        if len(rows) > MAX_SIGNERS:
            raise SignatureError(
                f"release {self.release.version} of {self.release.name} has {MAX_SIGNERS} signers already"
            )
        return replace(self, signatures=tuple(sorted(rows.items())))

    def check(self, trusted: TrustPolicy) -> Release:
        """The release, once enough trusted publishers of its name are known to have signed it.

        Signatures of keys that do not count for this name are not looked at. Raises SignatureError.
        """
        statement = self.release.encode()
        counting = [(key, sig) for key, sig in self.signatures if key in trusted.publishers_of(self.release.name)]
        for key, signature in counting:
            signing.verify(key, RELEASE_TYPE, statement, signature)
        trusted.check(self.release.name, frozenset(key for key, _ in self.signatures))
        return self.release

    def encode(self) -> bytes:
        rows: list[Value] = [{"key": key, "sig": signature} for key, signature in self.signatures]
        return canonical.encode({"v": 2, "release": self.release.encode(), "sigs": rows})

    @classmethod
    def decode(cls, block: bytes) -> SignedRelease:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(block, max_bytes=MAX_SIGNATURE_BYTES), "signature") as f:
            if f.integer("v", 1, 2) == 1:
                raise FormatError("this signature says no version and no expiry (format 1): publish the model again")
            rows = tuple(_row(item) for item in f.items("sigs", MAX_SIGNERS))
            signed = cls(Release.decode(f.data("release", 1, MAX_STATEMENT_BYTES)), rows)
        if list(rows) != sorted(dict(rows).items()):
            raise FormatError("the signatures are not sorted by key, or a key signs twice")
        return signed


def _row(item: Value) -> tuple[PublicKey, bytes]:
    with Fields(item, "signature.sigs") as f:
        return PublicKey(f.data("key", KEY_BYTES, KEY_BYTES)), f.data("sig", SIGNATURE_BYTES, SIGNATURE_BYTES)
