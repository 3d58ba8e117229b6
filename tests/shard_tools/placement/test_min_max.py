"""No cut is better than the one that is chosen."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.errors import InputError
from shard_tools.placement.min_max import cut


def heaviest(layers: list[int], head: int, ranges: tuple[tuple[int, int], ...]) -> int:
    return max(sum(layers[a:b]) + head * (b == len(layers)) for a, b in ranges)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 60), st.data())
def test_the_heaviest_stage_is_as_light_as_can_be(layers: list[int], head: int, data: st.DataObject) -> None:
    """Held against every cut there is; the ranges tile the layers, none is empty."""
    n_stages = data.draw(st.integers(1, len(layers)))
    found = cut(layers, head, n_stages)
    assert len(found) == n_stages
    assert [layer for start, stop in found for layer in range(start, stop)] == list(range(len(layers)))
    assert all(start < stop for start, stop in found)
    every = (
        tuple(itertools.pairwise((0, *cuts, len(layers))))
        for cuts in itertools.combinations(range(1, len(layers)), n_stages - 1)
    )
    assert heaviest(layers, head, found) == min(heaviest(layers, head, ranges) for ranges in every)


def test_a_head_takes_the_place_of_layers() -> None:
    """As in Llama-3-8B, whose head weighs 2.4 layers."""
    assert cut([10] * 32, 24, 2) == ((0, 17), (17, 32))
    assert cut([10] * 32, 0, 4) == ((0, 8), (8, 16), (16, 24), (24, 32))


@pytest.mark.parametrize("n_stages", [0, -1, 4])
def test_what_cannot_be_cut_is_refused(n_stages: int) -> None:
    with pytest.raises(InputError, match=f"cut into {n_stages} stages"):
        cut([1, 1, 1], 1, n_stages)
