"""All that a client needs to check an answer by itself, as one value, one byte string and one line of text.

Laws: `Bundle.decode(b.encode()) == b`; `Bundle.from_text(b.to_text()) == b`; any other bytes are refused.
Decoding checks form and size only; what the bundle proves is for check.py to say. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from serve_app.messages.request import MAX_TOKENS, MAX_VOCAB, NONCE_BYTES
from serve_app.receipts.identity import MAX_CERTIFICATE_BYTES, MAX_REGISTRY_BYTES
from serve_app.receipts.receipt import MAX_RECEIPT_BYTES
from serve_app.receipts.statement import MAX_STAGES, MAX_STATEMENT_BYTES
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.errors import FormatError
from shard_tools.signing import Envelope

MAX_BUNDLE_BYTES = 16 << 20  # a receipt and a prompt of 2**20 ids each, 64 statements of 64 KiB


@dataclass(frozen=True, slots=True)
class Opening:
    """What opens the request's commitment; with it, anybody can read the prompt."""

    prompt_ids: tuple[int, ...]
    salt: bytes
    client_nonce: bytes  # empty if the client chose none


@dataclass(frozen=True, slots=True)
class Bundle:
    """A receipt and everything it rests on but the operator's key."""

    receipt: Envelope
    statements: tuple[Envelope, ...]  # in the order of stages
    certificates: tuple[Envelope, ...]  # of every session that signed, each once, sorted by payload
    registry: Envelope
    opening: Opening

    def encode(self) -> bytes:
        """The bytes of FinishedEvent.receipt."""
        return canonical.encode(
            {
                "v": 1,
                "receipt": self.receipt.to_value(),
                "statements": [envelope.to_value() for envelope in self.statements],
                "certificates": [envelope.to_value() for envelope in self.certificates],
                "registry": self.registry.to_value(),
                "opening": {
                    "prompt_ids": list(self.opening.prompt_ids),
                    "salt": self.opening.salt,
                    "nonce": self.opening.client_nonce,
                },
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Bundle:
        """Read a bundle. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_BUNDLE_BYTES), "bundle") as f:
            f.integer("v", 1, 1)
            receipt = Envelope.from_value(f.any("receipt"), "bundle.receipt", MAX_RECEIPT_BYTES)
            statements = tuple(
                Envelope.from_value(item, f"bundle.statements[{i}]", MAX_STATEMENT_BYTES)
                for i, item in enumerate(f.items("statements", MAX_STAGES))
            )
            certificates = tuple(
                Envelope.from_value(item, f"bundle.certificates[{i}]", MAX_CERTIFICATE_BYTES)
                for i, item in enumerate(f.items("certificates", MAX_STAGES + 1))
            )
            registry = Envelope.from_value(f.any("registry"), "bundle.registry", MAX_REGISTRY_BYTES)
            with Fields(f.any("opening"), "bundle.opening") as o:
                opening = Opening(
                    o.integers("prompt_ids", MAX_TOKENS, 0, MAX_VOCAB),
                    o.data("salt", NONCE_BYTES, NONCE_BYTES),
                    o.data("nonce", 0, NONCE_BYTES),
                )
        return cls(receipt, statements, certificates, registry, opening)

    def to_text(self) -> str:
        """Base64url without padding: fits a JSON string, a header and a shell argument."""
        return base64.urlsafe_b64encode(self.encode()).decode("ascii").rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> Bundle:
        """Read to_text's form. Raises FormatError."""
        return cls.decode(bytes_of_text(text))


def bytes_of_text(text: str) -> bytes:
    """The bytes behind a bundle's text form; surrounding white space is allowed. Raises FormatError."""
    text = text.strip()
    if len(text) > MAX_BUNDLE_BYTES * 4 // 3 + 4:
        raise FormatError(f"{len(text)} characters of text where a receipt has at most {MAX_BUNDLE_BYTES * 4 // 3}")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as e:
        raise FormatError(f"{text[:40]!r}... is not base64url: {e}") from e
    if base64.urlsafe_b64encode(data).decode("ascii").rstrip("=") != text:
        raise FormatError(f"{text[:40]!r}... is not the canonical base64url of its bytes")
    return data
