"""SHA-256 of each row where it lies, so that of a row only 32 bytes leave the device.

Equals sha256(prefix + position as u64 little-endian + the row's bytes): the leaf that receipts/rows.py describes, here
only a hash of bytes. One lane hashes one row.
Source: FIPS 180-4, sections 4.1.2, 4.2.2 and 6.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PREFIX_BYTES = 56  # with the position they fill the first block
_LANES = 32

# fmt: off
_ROUND_CONSTANTS = (
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
    0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
    0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
    0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
    0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
    0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
    0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
    0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
)
_START = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
# fmt: on


@triton.jit
def _right(x, n: tl.constexpr):
    return (x >> n) | (x << (32 - n))


@triton.jit
def _swap(x):
    """The four bytes in the other order."""
    return (x << 24) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00) | (x >> 24)


@triton.jit
def _turn(a, b, c, d, e, f, g, h, kw):
    """One round: what becomes of d and of h; the rest only changes names."""
    one = h + (_right(e, 6) ^ _right(e, 11) ^ _right(e, 25)) + ((e & f) ^ (~e & g)) + kw
    two = (_right(a, 2) ^ _right(a, 13) ^ _right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
    return d + one, one + two


@triton.jit
def _next(w0, w1, w9, w14):
    """The schedule's next word in the place of w0."""
    low = _right(w1, 7) ^ _right(w1, 18) ^ (w1 >> 3)
    high = _right(w14, 17) ^ _right(w14, 19) ^ (w14 >> 10)
    return w0 + low + w9 + high


@triton.jit
def _word(data, row, real, j, prefix, position, WORDS: tl.constexpr, LAST: tl.constexpr):
    """Word j of the message: 14 of prefix, 2 of position, the row's, then padding and the length in bits."""
    j = tl.zeros(row.shape, tl.int32) + j
    at = j - 16
    inside = (at >= 0) & (at < WORDS)
    word = _swap(tl.load(data + row * WORDS + at, mask=real & inside, other=0).to(tl.uint32, bitcast=True))
    head = tl.load(prefix + j, mask=j < 14, other=0).to(tl.uint32, bitcast=True)
    word = tl.where(j < 14, head, word)
    word = tl.where(j == 14, _swap(position), word)
    word = tl.where(at == WORDS, tl.full(word.shape, 0x80000000, tl.uint32), word)
    return tl.where(j == LAST, tl.full(word.shape, 512 + 32 * WORDS, tl.uint32), word)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["data", "positions", "out"])
def _hash_rows(
    data,
    positions,
    prefix,
    constants,
    out,
    n_rows,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = row < n_rows
    position = tl.load(positions + row, mask=real, other=0).to(tl.uint32, bitcast=True)
    zero = tl.zeros([LANES], tl.uint32)
    s0 = zero + tl.load(constants + 64).to(tl.uint32, bitcast=True)
    s1 = zero + tl.load(constants + 65).to(tl.uint32, bitcast=True)
    s2 = zero + tl.load(constants + 66).to(tl.uint32, bitcast=True)
    s3 = zero + tl.load(constants + 67).to(tl.uint32, bitcast=True)
    s4 = zero + tl.load(constants + 68).to(tl.uint32, bitcast=True)
    s5 = zero + tl.load(constants + 69).to(tl.uint32, bitcast=True)
    s6 = zero + tl.load(constants + 70).to(tl.uint32, bitcast=True)
    s7 = zero + tl.load(constants + 71).to(tl.uint32, bitcast=True)
    last: tl.constexpr = BLOCKS * 16 - 1
    for block in range(BLOCKS):
        j = block * 16
        w0 = _word(data, row, real, j, prefix, position, WORDS, last)
        w1 = _word(data, row, real, j + 1, prefix, position, WORDS, last)
        w2 = _word(data, row, real, j + 2, prefix, position, WORDS, last)
        w3 = _word(data, row, real, j + 3, prefix, position, WORDS, last)
        w4 = _word(data, row, real, j + 4, prefix, position, WORDS, last)
        w5 = _word(data, row, real, j + 5, prefix, position, WORDS, last)
        w6 = _word(data, row, real, j + 6, prefix, position, WORDS, last)
        w7 = _word(data, row, real, j + 7, prefix, position, WORDS, last)
        w8 = _word(data, row, real, j + 8, prefix, position, WORDS, last)
        w9 = _word(data, row, real, j + 9, prefix, position, WORDS, last)
        w10 = _word(data, row, real, j + 10, prefix, position, WORDS, last)
        w11 = _word(data, row, real, j + 11, prefix, position, WORDS, last)
        w12 = _word(data, row, real, j + 12, prefix, position, WORDS, last)
        w13 = _word(data, row, real, j + 13, prefix, position, WORDS, last)
        w14 = _word(data, row, real, j + 14, prefix, position, WORDS, last)
        w15 = _word(data, row, real, j + 15, prefix, position, WORDS, last)
        a, b, c, d, e, f, g, h = s0, s1, s2, s3, s4, s5, s6, s7
        for i in range(0, 64, 16):
            if i > 0:
                w0 = _next(w0, w1, w9, w14)
                w1 = _next(w1, w2, w10, w15)
                w2 = _next(w2, w3, w11, w0)
                w3 = _next(w3, w4, w12, w1)
                w4 = _next(w4, w5, w13, w2)
                w5 = _next(w5, w6, w14, w3)
                w6 = _next(w6, w7, w15, w4)
                w7 = _next(w7, w8, w0, w5)
                w8 = _next(w8, w9, w1, w6)
                w9 = _next(w9, w10, w2, w7)
                w10 = _next(w10, w11, w3, w8)
                w11 = _next(w11, w12, w4, w9)
                w12 = _next(w12, w13, w5, w10)
                w13 = _next(w13, w14, w6, w11)
                w14 = _next(w14, w15, w7, w12)
                w15 = _next(w15, w0, w8, w13)
            k = constants + i
            d, h = _turn(a, b, c, d, e, f, g, h, w0 + tl.load(k).to(tl.uint32, bitcast=True))
            c, g = _turn(h, a, b, c, d, e, f, g, w1 + tl.load(k + 1).to(tl.uint32, bitcast=True))
            b, f = _turn(g, h, a, b, c, d, e, f, w2 + tl.load(k + 2).to(tl.uint32, bitcast=True))
            a, e = _turn(f, g, h, a, b, c, d, e, w3 + tl.load(k + 3).to(tl.uint32, bitcast=True))
            h, d = _turn(e, f, g, h, a, b, c, d, w4 + tl.load(k + 4).to(tl.uint32, bitcast=True))
            g, c = _turn(d, e, f, g, h, a, b, c, w5 + tl.load(k + 5).to(tl.uint32, bitcast=True))
            f, b = _turn(c, d, e, f, g, h, a, b, w6 + tl.load(k + 6).to(tl.uint32, bitcast=True))
            e, a = _turn(b, c, d, e, f, g, h, a, w7 + tl.load(k + 7).to(tl.uint32, bitcast=True))
            d, h = _turn(a, b, c, d, e, f, g, h, w8 + tl.load(k + 8).to(tl.uint32, bitcast=True))
            c, g = _turn(h, a, b, c, d, e, f, g, w9 + tl.load(k + 9).to(tl.uint32, bitcast=True))
            b, f = _turn(g, h, a, b, c, d, e, f, w10 + tl.load(k + 10).to(tl.uint32, bitcast=True))
            a, e = _turn(f, g, h, a, b, c, d, e, w11 + tl.load(k + 11).to(tl.uint32, bitcast=True))
            h, d = _turn(e, f, g, h, a, b, c, d, w12 + tl.load(k + 12).to(tl.uint32, bitcast=True))
            g, c = _turn(d, e, f, g, h, a, b, c, w13 + tl.load(k + 13).to(tl.uint32, bitcast=True))
            f, b = _turn(c, d, e, f, g, h, a, b, w14 + tl.load(k + 14).to(tl.uint32, bitcast=True))
            e, a = _turn(b, c, d, e, f, g, h, a, w15 + tl.load(k + 15).to(tl.uint32, bitcast=True))
        s0 += a
        s1 += b
        s2 += c
        s3 += d
        s4 += e
        s5 += f
        s6 += g
        s7 += h
    at = out + row * 8
    tl.store(at, _swap(s0).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 1, _swap(s1).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 2, _swap(s2).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 3, _swap(s3).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 4, _swap(s4).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 5, _swap(s5).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 6, _swap(s6).to(tl.int32, bitcast=True), mask=real)
    tl.store(at + 7, _swap(s7).to(tl.int32, bitcast=True), mask=real)


class RowHasher:
    """Hashes rows of one width behind one prefix."""

    def __init__(self, prefix: bytes, row_bytes: int, device: torch.device) -> None:
        assert len(prefix) == PREFIX_BYTES and row_bytes % 4 == 0
        words = [int.from_bytes(prefix[i : i + 4], "big") for i in range(0, PREFIX_BYTES, 4)]
        self._words = row_bytes // 4
        self._prefix = _ints(words, device)
        self._constants = _ints([*_ROUND_CONSTANTS, *_START], device)

    def hash(self, rows: Tensor, positions: Tensor, out: Tensor) -> None:
        """rows [n, row_bytes / 4] int32 as they lie in memory, positions [n] int32 -> out [n, 8] int32: the digests."""
        n = len(positions)
        assert rows.dtype == torch.int32 and rows.numel() == n * self._words and rows.is_contiguous()
        _hash_rows[(triton.cdiv(n, _LANES),)](
            rows,
            positions,
            self._prefix,
            self._constants,
            out,
            n,
            WORDS=self._words,
            BLOCKS=1 + (self._words + 3 + 15) // 16,
            LANES=_LANES,
            num_warps=1,
        )


def _ints(words: list[int], device: torch.device) -> Tensor:
    return torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32, device=device)
