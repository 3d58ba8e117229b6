"""Which kind of edge joins two processes. Whole pipelines over each kind: e2e/."""

from __future__ import annotations

import pytest

from serve_app.cluster.wiring import EdgeMode, Kind, Party, kind_between, signed_between
from shard_tools.signing import Signer


@pytest.mark.parametrize(
    ("mode", "same_node", "kind"),
    [
        ("auto", True, "shared_memory"),
        ("auto", False, "tcp"),
        ("tcp", True, "tcp"),
        ("tcp", False, "tcp"),
        ("ray", True, "ray"),
        ("ray", False, "ray"),
    ],
)
def test_neighbours_of_one_ray_node_share_memory_and_others_talk_tls(
    mode: EdgeMode, same_node: bool, kind: Kind
) -> None:
    """By Ray's node and not by address: two pods may share an address, and never /proc."""
    key = Signer.from_seed(bytes(32)).public
    a = Party("stage 0", key, 1, "node-a", "10.0.0.1")
    b = Party("stage 1", key, 2, "node-a" if same_node else "node-b", "10.0.0.1")
    assert kind_between(mode, a, b) == kind


@pytest.mark.parametrize("mode", ["auto", "tcp", "ray"])
def test_a_stage_outside_talks_tls_whoever_it_talks_to(mode: EdgeMode) -> None:
    """Two of them are on no Ray node: that does not make them neighbours of one kernel."""
    key = Signer.from_seed(bytes(32)).public
    inside = Party("stage 0", key, 1, "node-a", "10.0.0.1")
    one, two = (Party(f"stage {i}", key, 0, "", "10.0.0.2") for i in (1, 2))
    assert [kind_between(mode, a, b) for a, b in ((inside, one), (one, two), (two, inside))] == ["tcp"] * 3


def test_rows_are_signed_for_where_one_of_two_stages_is_another_operators() -> None:
    """Inside one cluster a signature binds its operator alone, and is made if somebody asks for it."""
    key = Signer.from_seed(bytes(32)).public
    inside, beside = (Party(f"stage {i}", key, 1, node, "10.0.0.1") for i, node in enumerate(("node-a", "node-b")))
    outside = Party("stage 2", key, 0, "", "10.0.0.2")
    pairs = ((inside, beside), (beside, outside), (outside, inside), (outside, outside))
    assert [signed_between("auto", a, b) for a, b in pairs] == [False, True, True, True]
    assert {signed_between("always", a, b) for a, b in pairs} == {True}
    assert {signed_between("never", a, b) for a, b in pairs} == {False}
