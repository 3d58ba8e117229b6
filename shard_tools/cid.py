"""Names of blocks: CIDv1, SHA-256, in base32, and nothing else.

Law: `Cid.parse(str(c)) == c` and `Cid.from_bytes(bytes(c)) == c`.
Knows nothing of what is inside a block. Source: https://github.com/multiformats/cid
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from enum import IntEnum

from shard_tools.errors import FormatError

_DIGEST_BYTES = 32
_SHA2_256 = 0x12
_TEXT_CHARS = 59  # 'b' and 58 base32 characters for 36 bytes


class Codec(IntEnum):
    """How the bytes of a block are to be read (multicodec table)."""

    RAW = 0x55
    DAG_PB = 0x70
    DAG_CBOR = 0x71


@dataclass(frozen=True, slots=True, order=True)
class Cid:
    """The name of one block: its codec and the SHA-256 of its bytes."""

    codec: Codec
    digest: bytes

    @classmethod
    def of(cls, codec: Codec, block: bytes | memoryview) -> Cid:
        """The name that these bytes have, wherever they are."""
        return cls(codec, hashlib.sha256(block).digest())

    @classmethod
    def parse(cls, text: str) -> Cid:
        """Read the base32 form. Raises FormatError for anything but its one canonical spelling."""
        if len(text) != _TEXT_CHARS or not text.startswith("b"):
            raise FormatError(f"{text[:80]!r} is not a CID: expected a base32 CIDv1 of {_TEXT_CHARS} characters")
        try:
            raw = base64.b32decode(text[1:].upper() + "======")
        except ValueError as e:
            raise FormatError(f"{text[:80]!r} is not a CID: {e}") from e
        cid = cls.from_bytes(raw)
        if str(cid) != text:
            raise FormatError(f"{text!r} is not the canonical spelling of {cid}")
        return cid

    @classmethod
    def from_bytes(cls, raw: bytes) -> Cid:
        """Read the binary form. Raises FormatError for other versions, codecs and hashes."""
        known = raw[1] in set(Codec) if len(raw) == 4 + _DIGEST_BYTES else False
        if not known or raw[0] != 1 or raw[2] != _SHA2_256 or raw[3] != _DIGEST_BYTES:
            raise FormatError(f"not a CIDv1 of raw, dag-pb or dag-cbor with SHA-256: {raw[:40].hex()}")
        return cls(Codec(raw[1]), raw[4:])

    def __bytes__(self) -> bytes:
        return bytes((1, self.codec, _SHA2_256, _DIGEST_BYTES)) + self.digest

    def __str__(self) -> str:
        return "b" + base64.b32encode(bytes(self)).decode().lower().rstrip("=")
