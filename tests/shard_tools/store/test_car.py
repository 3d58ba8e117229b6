"""CAR files: the round trip, and every stream that is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, FormatError, LlmdError
from shard_tools.store.car import read_car, write_car

ROOT = Cid.of(Codec.DAG_CBOR, b"root")


def car(*blocks: bytes) -> bytes:
    out = io.BytesIO()
    size = write_car(out, [ROOT], ((Cid.of(Codec.RAW, block), block) for block in blocks))
    assert size == len(out.getvalue())
    return out.getvalue()


def read(data: bytes) -> list[tuple[Cid, bytes]]:
    roots, blocks = read_car(io.BytesIO(data), "test.car")
    assert roots == (ROOT,)
    return list(blocks)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_what_was_written_is_read_again(blocks: list[bytes]) -> None:
    assert read(car(*blocks)) == [(Cid.of(Codec.RAW, block), block) for block in blocks]


def test_the_bytes_are_those_of_the_specification() -> None:
    """The header as ipld.io spells it: a2 65 "roots" 81 d8 2a 58 25 00 <cid> 67 "version" 01."""
    header = bytes.fromhex("3aa265726f6f747381d82a582500") + bytes(ROOT) + bytes.fromhex("6776657273696f6e01")
    block = bytes([36 + 2]) + bytes(Cid.of(Codec.RAW, b"xy")) + b"xy"
    assert car(b"xy") == header + block


@given(st.data())
def test_a_stream_cut_short_anywhere_is_refused_or_ends_between_blocks(data: st.DataObject) -> None:
    """Only whole, right blocks come out of a part; a cut between two blocks cannot be told from an end."""
    whole = car(b"a" * 200, b"b" * 10, b"")
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    out: list[tuple[Cid, bytes]] = []
    try:
        out += read_car(io.BytesIO(part), "test.car")[1]
    except FormatError:
        return
    assert out == read(whole)[: len(out)]


@given(st.data())
def test_a_flipped_byte_yields_nothing_wrong(data: st.DataObject) -> None:
    whole = car(b"a" * 50, b"b" * 10)
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    try:
        for cid, block in read_car(io.BytesIO(bad), "test.car")[1]:
            assert Cid.of(cid.codec, block) == cid
    except LlmdError:
        pass


class Endless(io.RawIOBase):
    """A stream that never ends, and says how much was asked of it."""

    def __init__(self, head: bytes) -> None:
        self.head, self.asked = head, 0

    def read(self, size: int = -1) -> bytes:
        self.asked += size
        part, self.head = self.head[:size], self.head[size:]
        return part or bytes(size)


@pytest.mark.parametrize("head", [b"", car()], ids=["header", "block"])
def test_a_length_of_a_gibibyte_is_refused_before_anything_is_read(head: bytes) -> None:
    stream = Endless(head + b"\x80\x80\x80\x80\x04")
    with pytest.raises(FormatError, match="1073741824 bytes"):
        list(read_car(stream, "test.car")[1])  # type: ignore[arg-type]
    assert stream.asked < len(head) + 20


def header(value: canonical.Value) -> bytes:
    body = canonical.encode(value)
    return bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (header({"version": 2, "roots": [ROOT]}), "version"),
        (header({"version": 1, "roots": []}), "names no root"),
        (header({"version": 1, "roots": [ROOT], "more": 1}), "unknown field"),
        (b"\x05hello", "canonical"),
        (b"\xff" * 20, "at most"),
        (b"\xba\x00" + car()[1:], "at byte 2"),
        (car() + bytes([10]) + bytes(10), "no room for its name"),
        (car() + bytes([37]) + bytes.fromhex("0155 1620") + bytes(32) + b"x", "SHA-256"),
        (car() + bytes([37]) + bytes.fromhex("1220") + bytes(34) + b"x", "SHA-256"),
    ],
    ids=["empty", "v2", "rootless", "field", "text", "varint", "long-varint", "nameless", "sha3", "cidv0"],
)
def test_what_is_no_car_of_ours_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        list(read_car(io.BytesIO(data), "test.car")[1])


def test_a_block_that_is_not_what_its_name_says_is_refused() -> None:
    good = car(b"good")
    with pytest.raises(CorruptBlockError, match=r"test\.car"):
        read(good[:-4] + b"evil")


def test_a_pipe_that_gives_little_at_a_time_is_read_whole() -> None:
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 3))

    blocks: Iterator[tuple[Cid, bytes]] = read_car(Dribble(car(b"x" * 100)), "test.car")[1]
    assert [block for _, block in blocks] == [b"x" * 100]
