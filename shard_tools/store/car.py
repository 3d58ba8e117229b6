"""CAR v1: many blocks in one stream, the form in which gateways, `ipfs dag export` and memory sticks carry a model.

    [varint length][DAG-CBOR {roots: [&root...], version: 1}]      once, then for each block
    [varint length][36 bytes of CID][block]

Laws: what `write_car` wrote, `read_car` yields again; every block yielded hashes to the name it came with. No number
read from the stream is allocated by before it is bounded, so a length of 1 GiB costs nothing.
Knows nothing of what the blocks mean. Source: https://ipld.io/specs/transport/car/carv1/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, BinaryIO, Protocol

from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block

MAX_ROOTS = 64
MAX_HEADER_BYTES = 4 << 10  # 64 roots take 2.7 KB
_CID_BYTES = 36
_VARINT_BYTES = 5  # 2^35: more than any length that is accepted


class Readable(Protocol):
    """What a CAR is read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""


def write_car(out: IO[bytes], roots: Sequence[Cid], blocks: Iterable[tuple[Cid, bytes]]) -> int:
    """The blocks are in `out` behind a header that names the roots; returns the bytes written."""
    assert 0 < len(roots) <= MAX_ROOTS
    links: list[Value] = list(roots)
    header = canonical.encode({"version": 1, "roots": links})
    written = out.write(_varint(len(header)) + header)
    for cid, block in blocks:
        written += out.write(_varint(_CID_BYTES + len(block)) + bytes(cid))
        written += out.write(block)
    return written


def read_car(stream: BinaryIO, label: str) -> tuple[tuple[Cid, ...], Iterator[tuple[Cid, bytes]]]:
    """The roots, and the blocks as they are read, each hashed. label: what errors call the stream.

    Raises FormatError for a stream that is cut short, is no CAR v1, or names a block by another hash than SHA-256, and
    CorruptBlockError for a block that does not hash to its name; what was yielded before stays right.
    """
    reader = _Reader(stream, label)
    roots = _roots(reader)
    if not roots:
        raise FormatError(f"{label} names no root that this project knows")
    return roots, _blocks(reader)


def read_blocks(stream: Readable, label: str) -> Iterator[tuple[Cid, bytes]]:
    """As read_car, of a stream whose roots say nothing: a gateway may write there what it likes."""
    reader = _Reader(stream, label)
    _roots(reader)
    yield from _blocks(reader)


def _roots(reader: _Reader) -> tuple[Cid, ...]:
    size = reader.length(MAX_HEADER_BYTES, "header")
    if size is None:
        raise FormatError(f"{reader.label} is empty, and no CAR file")
    with Fields(canonical.decode(reader.take(size), max_bytes=MAX_HEADER_BYTES), f"the header of {reader.label}") as f:
        f.integer("version", 1, 1)
        return tuple(item for item in f.items("roots", MAX_ROOTS) if isinstance(item, Cid))


def _blocks(reader: _Reader) -> Iterator[tuple[Cid, bytes]]:
    while (size := reader.length(_CID_BYTES + MAX_BLOCK_BYTES, "block")) is not None:
        if size < _CID_BYTES:
            raise FormatError(f"{reader.label} has a block of {size} bytes at byte {reader.at}: no room for its name")
        cid = Cid.from_bytes(reader.take(_CID_BYTES))
        yield cid, check_block(cid, reader.take(size - _CID_BYTES), reader.label)


class _Reader:
    """A stream, and how far it was read."""

    def __init__(self, stream: Readable, label: str) -> None:
        self._stream, self.label, self.at = stream, label, 0

    def length(self, most: int, what: str) -> int | None:
        """The length that stands here, at most `most`; None where the stream ends before it."""
        value = 0
        for i in range(_VARINT_BYTES):
            byte = self._stream.read(1)
            if not byte and i == 0:
                return None
            if not byte:
                raise self._cut_short()
            self.at += 1
            value |= (byte[0] & 0x7F) << 7 * i
            if byte[0] < 0x80:
                if value > most or (byte[0] == 0 and i > 0):
                    break
                return value
        raise FormatError(
            f"{self.label} says at byte {self.at} that a {what} has {value} bytes; at most {most} are read"
        )

    def take(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            part = self._stream.read(left)  # a pipe may give less than asked for
            if not part:
                raise self._cut_short()
            parts.append(part)
            left -= len(part)
        self.at += size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _cut_short(self) -> FormatError:
        return FormatError(f"{self.label} is cut short after byte {self.at}; copy it again")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
