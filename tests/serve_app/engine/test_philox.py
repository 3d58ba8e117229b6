"""Philox4x32-10 is the published function, whatever the shape it is asked in."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from serve_app.engine.philox import philox4x32, uniform_bits

# Random123's kat_vectors file: counter, key, output, as 32-bit words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "out"), KNOWN)
def test_known_answers(counter: str, key: str, out: str) -> None:
    """The three known answers that Random123 ships, as scalars and as arrays."""
    raw_key = struct.pack("<2I", *words(key))
    c0, c1, c2, c3 = (np.uint64(word) for word in words(counter))
    assert [int(word) for word in philox4x32(c0, c1, c2, c3, raw_key)] == words(out)
    a0, a1, a2, a3 = (np.full(3, word) for word in (c0, c1, c2, c3))
    assert [word.tolist() for word in map(np.asarray, philox4x32(a0, a1, a2, a3, raw_key))] == [
        [word] * 3 for word in words(out)
    ]


def test_bits_depend_only_on_key_position_and_token() -> None:
    """Asking for one token, for all, or in another order gives the same bits for each token."""
    key = bytes(range(8))
    everything = uniform_bits(key, 7, np.arange(1000, dtype=np.uint32))
    assert everything.dtype == np.uint32
    shuffled = np.random.default_rng(1).permutation(1000).astype(np.uint32)
    assert np.array_equal(uniform_bits(key, 7, shuffled), everything[shuffled])
    assert uniform_bits(key, 7, np.array([[41]], dtype=np.uint32)) == everything[41]
    far_apart = np.array([3, 4_000_001, 999], dtype=np.uint32)
    assert uniform_bits(key, 7, far_apart).tolist()[::2] == everything[far_apart[::2]].tolist()
    assert uniform_bits(key, 7, np.arange(0, dtype=np.uint32)).shape == (0,)
    assert not np.array_equal(uniform_bits(key, 8, np.arange(1000, dtype=np.uint32)), everything)


def test_a_token_has_the_word_of_its_own() -> None:
    """Word id % 4 of counter (position, id // 4, 0, 0), as PROTOCOL.md says."""
    for token in (0, 1, 6, 11, 4097):
        zero = np.uint64(0)
        four = philox4x32(np.uint64(5), np.uint64(token // 4), zero, zero, b"abcdefgh")
        assert uniform_bits(b"abcdefgh", 5, np.array([token], dtype=np.uint32))[0] == four[token % 4]


def test_bits_look_uniform() -> None:
    """Mean and variance of 100k draws are those of a uniform variable to within five standard errors."""
    u = uniform_bits(b"12345678", 0, np.arange(100_000, dtype=np.uint32)) / 2.0**32
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / 100_000) ** 0.5
