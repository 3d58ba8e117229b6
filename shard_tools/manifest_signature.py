"""A publisher's signature over a manifest: a block of its own beside the manifest, which it links.

DSSE over the manifest's bytes, so it says "I published exactly this model"; detached, so the manifest's CID does
not depend on who signs. Law: `ManifestSignature.decode(s.encode()) == s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from shard_tools import canonical, signing
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import SignatureError
from shard_tools.manifest import PAYLOAD_TYPE
from shard_tools.signing import KEY_BYTES, SIGNATURE_BYTES, PublicKey, Signer, key_text

MAX_SIGNATURE_BYTES = 8 << 10
MAX_SIGNERS = 32


@dataclass(frozen=True, slots=True)
class ManifestSignature:
    """Who signed the manifest of this name; sorted by key. Nothing is checked until `check`."""

    manifest: Cid
    signatures: tuple[tuple[PublicKey, bytes], ...]

    @classmethod
    def sign(cls, manifest_block: bytes, *signers: Signer) -> ManifestSignature:
        """Signed by each signer. Equal keys and manifest give equal bytes."""
        pairs = sorted((signer.public, signer.sign(PAYLOAD_TYPE, manifest_block)) for signer in signers)
        return cls(Cid.of(Codec.DAG_CBOR, manifest_block), tuple(pairs))

    def check(self, manifest_block: bytes, trusted: frozenset[PublicKey]) -> PublicKey:
        """The trusted key that signed this manifest. Raises SignatureError if none did."""
        if Cid.of(Codec.DAG_CBOR, manifest_block) != self.manifest:
            raise SignatureError(f"this signature is over the manifest {self.manifest}, not the one it came with")
        for key, signature in self.signatures:
            if key in trusted:
                signing.verify(key, PAYLOAD_TYPE, manifest_block, signature)
                return key
        signers = ", ".join(key_text(key) for key, _ in self.signatures) or "nobody"
        raise SignatureError(
            f"manifest {self.manifest} is signed by {signers}, none of whom is a trusted publisher. "
            f"If you trust them, pass that key as trusted."
        )

    def encode(self) -> bytes:
        rows: list[Value] = [{"key": key, "sig": signature} for key, signature in self.signatures]
        return canonical.encode({"v": 1, "manifest": self.manifest, "sigs": rows})

    @classmethod
    def decode(cls, block: bytes) -> ManifestSignature:
        """Read what encode wrote. Raises FormatError."""
        with Fields(canonical.decode(block, max_bytes=MAX_SIGNATURE_BYTES), "manifest signature") as f:
            f.integer("v", 1, 1)
            rows = tuple(_row(item) for item in f.items("sigs", MAX_SIGNERS))
            return cls(f.link("manifest"), rows)


def _row(item: Value) -> tuple[PublicKey, bytes]:
    with Fields(item, "manifest signature.sigs") as f:
        return PublicKey(f.data("key", KEY_BYTES, KEY_BYTES)), f.data("sig", SIGNATURE_BYTES, SIGNATURE_BYTES)
