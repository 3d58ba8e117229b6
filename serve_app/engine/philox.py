"""Random bits that every machine computes alike: Philox4x32-10 on numpy.

The noise of one (position, token) depends on nothing but the request's key, so it does not matter what else
ran in the batch, on which device, or whether an auditor draws it a year later. Knows nothing of logits.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3 and table 2 (Random123).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 8

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # added to the key words each round
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10
_CHUNK = 8192  # counters at a time: their words stay in cache, 1.3 to 1.5x faster than 49152 at once

Word = NDArray[np.uint64]  # values below 2**32, kept wide so that a product fits


def uniform_bits(key: bytes, position: int, token_ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """32 uniform bits for each token id at this position: word id % 4 of counter (position, id // 4, 0, 0).

    Four neighbours share a counter, since its four words cost what one does. key: 8 bytes, two little-endian words.
    Returns uint32 of token_ids' shape.
    """
    assert len(key) == KEY_BYTES and 0 <= position < 1 << 32
    assert token_ids.dtype == np.uint32
    flat = token_ids.reshape(-1)
    if not len(flat):
        return np.empty(token_ids.shape, np.uint32)
    first, last = int(flat.min()) >> 2, int(flat.max()) >> 2
    if last - first < len(flat):  # most of what lies between is wanted: every counter once
        words = _words(key, position, np.arange(first, last + 1, dtype=np.uint64))
        out: NDArray[np.uint32] = words.reshape(-1)[flat - np.uint32(4 * first)]
    else:
        words = _words(key, position, (flat >> np.uint32(2)).astype(np.uint64))
        out = words[np.arange(len(flat)), flat & np.uint32(3)]
    return out.reshape(token_ids.shape)


def _words(key: bytes, position: int, counters: Word) -> NDArray[np.uint32]:
    """[counters, 4]: all that counters (position, counter, 0, 0) give."""
    zero, out = np.uint64(0), np.empty((len(counters), 4), np.uint32)
    for start in range(0, len(counters), _CHUNK):
        chunk = counters[start : start + _CHUNK]
        for i, word in enumerate(philox4x32(np.uint64(position), chunk, zero, zero, key)):
            out[start : start + _CHUNK, i] = word
    return out


def philox4x32(
    c0: Word | np.uint64, c1: Word | np.uint64, c2: Word | np.uint64, c3: Word | np.uint64, key: bytes
) -> tuple[Word | np.uint64, Word | np.uint64, Word | np.uint64, Word | np.uint64]:
    """The four output words of each counter. Words broadcast: a scalar stays one for as long as it can."""
    k0, k1 = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    for _ in range(_ROUNDS):
        first, second = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ (c1 ^ np.uint64(k0)),
            second & _LOW,
            (first >> _HALF) ^ (c3 ^ np.uint64(k1)),
            first & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3
