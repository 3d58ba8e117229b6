"""The actors and placement groups of pipelines, as Ray has them: made, found by name, killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from serve_app.cluster.head_actor import HeadActor
from serve_app.cluster.named_actors import find_actor, kill_actor
from serve_app.cluster.resources import HEAD_CPUS, SPARE_CPUS, brief
from serve_app.cluster.specs import NAMESPACE, HeadSpec, Place, Resources, StageSpec, group_name, group_of
from serve_app.cluster.stage_actor import StageActor
from serve_app.errors import PipelineError

_log = logging.getLogger(__name__)
_PLACE_S = 60.0  # for the cluster to find room; a missing GPU would otherwise be waited for in silence
_KILL_S = 2.0  # for a task that kills a process on another node


async def make_room(group: int, n_stages: int, n_spares: int, wants: Resources, labels: dict[str, str]) -> Any:
    """The placement group: a bundle for each stage, the first one with room for the Head, then one for each spare.

    Raises PipelineError.
    """
    gpus = {"GPU": wants.gpus} if wants.gpus else {}
    bundles = [{"CPU": wants.cpus} | gpus for _ in range(n_stages)]
    bundles[0]["CPU"] += HEAD_CPUS
    bundles += [{"CPU": SPARE_CPUS} | gpus for _ in range(n_spares)]
    extra: dict[str, Any] = {"bundle_label_selector": [labels] * len(bundles)} if labels else {}
    made = placement_group(bundles, strategy="PACK", name=group_name(group), lifetime="detached", **extra)
    try:
        async with asyncio.timeout(_PLACE_S):
            await made.ready()
    except TimeoutError as e:
        raise PipelineError(
            f"no room for {n_stages} stages of {bundles[0]} and {n_spares} spares within {_PLACE_S:.0f} s; free in the "
            f"cluster: {brief(ray.available_resources())} of {brief(ray.cluster_resources())}. "
            f"Add nodes, or lower pipeline.stages, pipeline.spares or pipeline.threads_per_stage."
        ) from e
    return made


def room_of(group: int) -> Any:
    """Its placement group. Raises ValueError if there is none."""
    return ray.util.get_placement_group(group_name(group))


def make_stage(spec: StageSpec, place: Place, room: Any, wants: Resources) -> Any:
    """A process that may become this stage, or another one."""
    return StageActor.options(
        name=place.actor,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=SPARE_CPUS,  # its bundle is its own, and may be one that was made for a spare
        num_gpus=wants.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=place.bundle),
        # Spinning OpenMP threads of one stage would steal the cores of the next: 3-15x slower, measured.
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(wants.threads)}},
    ).remote(spec)


def make_head(spec: HeadSpec, place: Place, room: Any) -> Any:
    """A Head, beside some stage."""
    return HeadActor.options(
        name=place.actor,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=place.bundle),
    ).remote(spec)


def names_of(group: int) -> list[str]:
    """Its named actors."""
    return [name for name in _named_actors() if group_of(name) == group]


def known_groups() -> set[int]:
    """Pipelines that have an actor or a placement group, whole or not."""
    names = _named_actors()
    names += [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return {group for name in names if name and (group := group_of(name)) is not None}


def tear_down(group: int) -> None:
    """Every actor of this pipeline is killed and its placement group removed; nothing happens if there is none."""
    for name in names_of(group):
        kill_actor(find_actor(name))
    for made in placement_group_table().values():
        if made["name"] == group_name(group) and made["state"] != "REMOVED":
            remove_placement_group(room_of(group))


def _named_actors() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]


async def kill_processes(places: Sequence[Place]) -> None:
    """SIGKILL: a process that is stopped, or hangs in a call, ends by nothing else."""
    here = ray.get_runtime_context().get_node_id()
    far = []
    for place in places:
        if place.ray_node == here:
            _kill_process(place.pid)
        elif place.ray_node:
            far.append(_kill_process_there(place))
    if far:
        with suppress(TimeoutError, RayError):
            async with asyncio.timeout(_KILL_S):  # its node may be gone too
                await asyncio.gather(*far, return_exceptions=True)


def _kill_process_there(place: Place) -> Any:
    where = NodeAffinitySchedulingStrategy(place.ray_node, soft=False)
    return ray.remote(_kill_process).options(num_cpus=0, scheduling_strategy=where).remote(place.pid)


def _kill_process(pid: int) -> None:
    with suppress(OSError):
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # else another one has the number by now
            os.kill(pid, signal.SIGKILL)
            _log.warning("killed process %d, which did not end by itself", pid)
