"""Ed25519 keys, DSSE envelopes and the certificates of TLS: who said these bytes, and who is at the other end.

A signature covers DSSE's pre-authentication encoding of (payload type, payload), so that a signature
made for one kind of statement is never one for another. Says nothing of whether a key is to be trusted:
the caller passes the keys it trusts. The only home of the package `cryptography`.
Source: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NewType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from shard_tools import canonical
from shard_tools.errors import InputError, SignatureError

PublicKey = NewType("PublicKey", bytes)  # 32 raw bytes

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TLS_CLOCK_SKEW_S = 300  # hosts' clocks may differ by this much
_PREFIX = "llmd-ed25519:"  # of the one-line text form of a public key


def key_text(key: PublicKey) -> str:
    """The one-line text form of a public key; `parse_key` reads it back."""
    return _PREFIX + key.hex()


def parse_key(text: str) -> PublicKey:
    """Read `key_text`'s form. Raises InputError."""
    text = text.strip()
    try:
        raw = bytes.fromhex(text.removeprefix(_PREFIX))
    except ValueError:
        raw = b""
    if not text.startswith(_PREFIX) or len(raw) != KEY_BYTES:
        raise InputError(f"{text[:80]!r} is not a public key: expected {_PREFIX} and {2 * KEY_BYTES} hex digits")
    return PublicKey(raw)


def read_public_key(path: Path) -> PublicKey:
    """The public key in a one-line file. Raises InputError."""
    try:
        return parse_key(path.read_bytes()[:200].decode("ascii", "replace"))
    except OSError as e:
        raise InputError(f"cannot read the public key {path}: {e.strerror}") from e


class Signer:
    """Holds one private key and signs with it; never shows it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(
            key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        )

    @classmethod
    def fresh(cls) -> Signer:
        """A signer with a new random key that lives only in this process."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Signer:
        """The signer of a 32-byte seed: for tests and benchmarks that must repeat."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The signer of a PEM file that only its owner may read. Raises InputError otherwise."""
        try:
            mode = path.stat().st_mode & 0o777
            data = path.read_bytes()
        except OSError as e:
            raise InputError(f"cannot read the private key {path}: {e.strerror}") from e
        if mode & 0o077:
            raise InputError(f"the private key {path} has mode {mode:o}: others may read it. Run: chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as e:
            raise InputError(f"{path} is not an unencrypted PEM private key: {e}") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{path} holds a key that is not Ed25519")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """The signer of `path`, made there with mode 0600 if absent; two processes at once get the same key.

        Raises InputError.
        """
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(fd, "wb") as f:
                    f.write(pem)
                os.link(fresh, path)  # fails if another process was first, and then its key is the key
            except FileExistsError:
                pass
            except OSError as e:
                raise InputError(f"cannot write the private key {path}: {e.strerror}. Make room on its disk") from e
            finally:
                with suppress(OSError):
                    fresh.unlink()
        return cls.load(path)

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """64 bytes: the Ed25519 signature over the DSSE encoding of the payload."""
        return self._key.sign(_pre_auth(payload_type, payload))

    def certify_tls(self, now_s: int, lifetime_s: int) -> bytes:
        """A fresh Ed25519 key and the X.509 certificate by which this key vouches for it, as PEM.

        So the signer's own key goes into no TLS library, and what does is worthless after lifetime_s.
        """
        fresh = Ed25519PrivateKey.generate()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_x509_name("llmd edge"))
            .issuer_name(_x509_name(self.public.hex()))
            .public_key(fresh.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.fromtimestamp(now_s - TLS_CLOCK_SKEW_S, UTC))
            .not_valid_after(datetime.fromtimestamp(now_s + lifetime_s, UTC))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self._key, None)
        )
        private = fresh.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + private


def verify(key: PublicKey, payload_type: str, payload: bytes, signature: bytes) -> None:
    """Returns if `key` signed this payload as this type. Raises SignatureError."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _pre_auth(payload_type, payload))
    except (InvalidSignature, ValueError) as e:
        raise SignatureError(f"the signature by {key_text(key)} over this {payload_type} is wrong") from e


def tls_anchor(key: PublicKey) -> bytes:
    """The key as a trust anchor, DER: who is to accept the certificates it made, and no others, loads this.

    A wrapping of the public key alone, so whoever knows the key can make it. OpenSSL asks for a self-signed form and
    does not check an anchor's own signature; it is by a key that is thrown away.
    """
    name = _x509_name(key.hex())
    anchor = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(Ed25519PublicKey.from_public_bytes(key))
        .serial_number(1)
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(Ed25519PrivateKey.generate(), None)
    )
    return anchor.public_bytes(serialization.Encoding.DER)


def tls_issuer(certificate: bytes, trusted: frozenset[PublicKey]) -> PublicKey:
    """Which of these keys made this certificate (DER). TLS has shown that the peer holds the certificate's own key.

    Says by itself what OpenSSL's chain building has found, so nothing hangs on how the anchors were loaded.
    Raises SignatureError.
    """
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        issuer = str(leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (ValueError, IndexError) as e:
        raise SignatureError(f"the peer's certificate cannot be read: {e}") from e
    key = next((key for key in trusted if key.hex() == issuer), None)
    if key is None:
        raise SignatureError(f"the peer's certificate is by {issuer[:80]!r}, which is not expected here")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(leaf.signature, leaf.tbs_certificate_bytes)
    except InvalidSignature as e:
        raise SignatureError(f"the peer's certificate is not by {key_text(key)}, as it says") from e
    return key


def _x509_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass(frozen=True, slots=True)
class Envelope:
    """One payload, the type it was signed as, and one signature. Law: from_value(to_value(e)) == e."""

    payload_type: str
    payload: bytes
    key: PublicKey
    signature: bytes

    @classmethod
    def seal(cls, signer: Signer, payload_type: str, payload: bytes) -> Envelope:
        """The payload signed by `signer`."""
        return cls(payload_type, payload, signer.public, signer.sign(payload_type, payload))

    def open(self, payload_type: str, trusted: frozenset[PublicKey], who: str) -> bytes:
        """The payload, once a key of `trusted` is known to have signed it as `payload_type`.

        who: what the key should be, for the message ("the operator"). Raises SignatureError.
        """
        if self.payload_type != payload_type:
            raise SignatureError(f"expected {payload_type} signed by {who}, found {self.payload_type[:80]!r}")
        if self.key not in trusted:
            raise SignatureError(f"this {payload_type} is signed by {key_text(self.key)}, which is not {who}")
        verify(self.key, payload_type, self.payload, self.signature)
        return self.payload

    def to_value(self) -> canonical.Value:
        """As canonical.encode takes it."""
        return {"type": self.payload_type, "payload": self.payload, "key": self.key, "sig": self.signature}

    @classmethod
    def from_value(cls, value: canonical.Value, what: str, max_bytes: int) -> Envelope:
        """Read what to_value wrote; the signature is not checked here. Raises FormatError."""
        with canonical.Fields(value, what) as f:
            return cls(
                f.text("type", 100),
                f.data("payload", 1, max_bytes),
                PublicKey(f.data("key", KEY_BYTES, KEY_BYTES)),
                f.data("sig", SIGNATURE_BYTES, SIGNATURE_BYTES),
            )


def _pre_auth(payload_type: str, payload: bytes) -> bytes:
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
