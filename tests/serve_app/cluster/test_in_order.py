"""Messages of one sender, in order, however Ray delivers them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.cluster.ray_edge import InOrder
from serve_app.errors import ProtocolError


@given(st.permutations(range(20)))
def test_any_order_of_arrival_becomes_the_order_of_sending(arrival: list[int]) -> None:
    seen: list[bytes] = []
    inlet = InOrder(seen.append)
    for number in arrival:
        inlet.take(number, b"%d" % number)
    assert seen == [b"%d" % n for n in range(20)]


def test_a_number_seen_before_is_refused() -> None:
    inlet = InOrder(lambda message: None)
    inlet.take(0, b"")
    with pytest.raises(ProtocolError, match="message 0 where 1"):
        inlet.take(0, b"")


def test_a_number_far_ahead_is_refused() -> None:
    """A sender is never more than its unacknowledged messages ahead; more would fill memory."""
    with pytest.raises(ProtocolError):
        InOrder(lambda message: None).take(1000, b"")
