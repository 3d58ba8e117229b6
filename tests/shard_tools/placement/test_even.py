"""Even placement tiles the layers, whatever the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.errors import InputError
from shard_tools.placement.even import EvenPlanner, plan
from shard_tools.placement.planner import NodeView, StageView


@given(st.integers(1, 200), st.data())
def test_ranges_tile_the_layers_as_evenly_as_can_be(n_layers: int, data: st.DataObject) -> None:
    n_stages = data.draw(st.integers(1, n_layers))
    ranges = plan(n_layers, n_stages)
    assert [layer for start, stop in ranges for layer in range(start, stop)] == list(range(n_layers))
    lengths = [stop - start for start, stop in ranges]
    assert len(ranges) == n_stages and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("n_layers", "n_stages"), [(3, 4), (3, 0), (3, -1), (0, 1)])
def test_what_cannot_be_cut_is_refused(n_layers: int, n_stages: int) -> None:
    with pytest.raises(InputError, match=f"cut into {n_stages} stages"):
        plan(n_layers, n_stages)


def test_nodes_take_stages_in_turn() -> None:
    nodes = (NodeView("a", 1, False), NodeView("b", 1, True))
    placement = EvenPlanner().place(30, 3, nodes)
    assert placement.stages == (StageView(0, 10, "a"), StageView(10, 20, "b"), StageView(20, 30, "a"))
    with pytest.raises(InputError, match="no node"):
        EvenPlanner().place(30, 3, ())
