"""A hundred thousand altered bundles: each is refused or says the very same, none crashes, hangs or takes memory."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from serve_app.errors import ReceiptError
from serve_app.receipts.check import check
from shard_tools import canonical
from tests.serve_app.receipts.test_check import DATA, LATER_S, OPERATOR

HONEST = check(DATA, OPERATOR, now_s=LATER_S)
VALUE = canonical.decode(DATA, max_bytes=1 << 20)
LONGEST_S = 2.0  # of one check: milliseconds, on a machine that does other things as well


def altered_bytes(draw: random.Random) -> bytes:
    data = bytearray(DATA)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(data))
        match draw.randrange(5):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                del data[at : at + draw.randrange(1, 40)]
            case 3:
                data[at:at] = draw.randbytes(draw.randrange(1, 40))
            case _:
                other = draw.randrange(len(data))
                data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def altered_value(draw: random.Random) -> bytes:
    """In its canonical form, so that it is not the form that is refused."""
    return canonical.encode(_altered(VALUE, draw))


def _altered(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        return {**value, key: _altered(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return draw.choice(
            [
                [*value[:at], _altered(value[at], draw), *value[at + 1 :]],
                value[:at] + value[at + 1 :],
                value[:at] + [value[at]] * 2 + value[at + 1 :],
                draw.sample(value, len(value)),
            ]
        )
    if isinstance(value, bytes) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return value[:at] + bytes([value[at] ^ 1 << draw.randrange(8)]) + value[at + 1 :]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.8:
        return draw.choice([value + 1, value - 1, -value, value << 20, 0]) % (1 << 63)
    return draw.choice([None, True, 0, -1, 1 << 63, "", "x" * 200, b"", b"\0" * 32, [], {}, [[]] * 3])


def judge(mutations: int, seed: int) -> int:
    """How many were refused."""
    draw, refused = random.Random(seed), 0
    for i in range(mutations):
        data = (altered_bytes if i % 2 else altered_value)(draw)
        began = time.perf_counter()
        try:
            checked = check(data, OPERATOR, now_s=LATER_S)
        except ReceiptError:
            refused += 1
        else:
            assert data == DATA and checked == HONEST, data.hex()
        assert time.perf_counter() - began < LONGEST_S
    return refused


def test_altered_bundles_are_refused_or_the_same() -> None:
    """A few of them, in every run."""
    assert judge(1500, seed=0) > 1300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_altered_bundles_are_refused_or_the_same() -> None:
    """All."""
    assert judge(100_000, seed=1) > 90_000
