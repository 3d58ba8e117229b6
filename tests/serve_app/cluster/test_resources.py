"""What each stage asks of a cluster, so that it can be placed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from serve_app.cluster.resources import HEAD_CPUS, wanted
from serve_app.config import AppConfig


def config(stages: int, replicas: int = 1) -> AppConfig:
    model = {"name": "m", "store": "/store", "trust": ["/publisher.pub"]}
    return AppConfig.parse({"model": model, "pipeline": {"stages": stages, "replicas": replicas}})


@pytest.mark.parametrize(
    ("nodes", "stages", "threads"),
    [
        ([2.0], 2, 2),  # the laptop: its stages take turns
        ([2.0], 5, 2),
        ([0.0, 2.0, 4.0, 4.0], 2, 4),  # rayservice.yaml: head, ingress, two stage pods
        ([16.0] * 8, 2, 16),  # more nodes than stages
        ([16.0, 16.0], 8, 4),
    ],
)
def test_a_stage_never_asks_for_more_than_a_node_has(nodes: Sequence[float], stages: int, threads: int) -> None:
    """Also with the Head in its bundle."""
    wants = wanted(config(stages), nodes, 0.0)
    assert wants.device == "cpu" and wants.threads == threads
    assert wants.cpus + HEAD_CPUS <= max(nodes)
    assert wants.cpus * stages + HEAD_CPUS <= sum(nodes)


@pytest.mark.parametrize(
    ("nodes", "stages", "replicas"), [([2.0], 2, 2), ([8.0], 1, 3), ([16.0, 16.0], 2, 4), ([4.0] * 8, 2, 4)]
)
def test_all_pipelines_fit_beside_one_another(nodes: Sequence[float], stages: int, replicas: int) -> None:
    """No one takes CPUs or threads that are another's share."""
    wants = wanted(config(stages, replicas), nodes, 0.0)
    assert replicas * (wants.cpus * stages + HEAD_CPUS) <= sum(nodes)
    assert wants.cpus + HEAD_CPUS <= max(nodes)
    assert wants.threads >= 1


@pytest.mark.parametrize(("gpus", "device"), [(4.0, "cuda"), (3.0, "cuda"), (1.0, "cpu")])
def test_where_gpus_suffice_for_one_pipeline_all_are_made_of_gpus(gpus: float, device: str) -> None:
    """One without room waits for it; on CPUs it would answer otherwise, and many times slower."""
    assert wanted(config(2, 2), [64.0], gpus).device == device
