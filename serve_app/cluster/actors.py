"""The actors and placement groups of pipelines, as Ray has them: made, found by name, killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
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
from serve_app.cluster.specs import NAMESPACE, GroupId, HeadSpec, Place, Resources, StageSpec, is_supervisor
from serve_app.cluster.stage_actor import StageActor
from serve_app.cluster.stage_handle import RayStage
from serve_app.errors import NoRoomError

_log = logging.getLogger(__name__)
_PLACE_S = 60.0  # for the cluster to find room; a missing GPU would otherwise be waited for in silence
_ASK_EVERY_S = 5.0  # whoever makes room may do so piece by piece
_KILL_S = 2.0  # for a task that kills a process on another node


async def make_room(
    group: GroupId,
    n_stages: int,
    n_spares: int,
    wants: Resources,
    labels: dict[str, str],
    roomless: frozenset[int],
    beside_s: float,
    crowded: Callable[[], Awaitable[bool]],
) -> Any:
    """The placement group: a bundle for each stage, the first one with room for the Head, then one for each spare.

    roomless: stages that never live in it; their bundles only keep the numbers. crowded: called after beside_s without
    room; whether to wait on, and then again now and then. Raises NoRoomError.
    """
    gpus = {"GPU": wants.gpus} if wants.gpus else {}
    bundles = [{"CPU": SPARE_CPUS} if i in roomless else {"CPU": wants.cpus} | gpus for i in range(n_stages)]
    bundles[0]["CPU"] += HEAD_CPUS
    bundles += [{"CPU": SPARE_CPUS} | gpus for _ in range(n_spares)]
    extra: dict[str, Any] = {"bundle_label_selector": [labels] * len(bundles)} if labels else {}
    made = placement_group(bundles, strategy="PACK", name=str(group), lifetime="detached", **extra)
    placed = asyncio.ensure_future(made.ready())
    there = (await asyncio.wait({placed}, timeout=beside_s))[0]
    if not there and await crowded():
        until = time.monotonic() + _PLACE_S
        while not (there := (await asyncio.wait({placed}, timeout=_ASK_EVERY_S))[0]) and time.monotonic() < until:
            await crowded()
    if there:
        await placed
        return made
    placed.cancel()
    raise NoRoomError(
        f"no room for {n_stages - len(roomless)} stages of {brief(bundles[-1 - n_spares])} and {n_spares} spares; free "
        f"in the cluster: {brief(ray.available_resources())} of {brief(ray.cluster_resources())}. "
        f"Add nodes, or lower pipeline.stages, pipeline.spares or pipeline.threads_per_stage."
    )


async def has_room(group: GroupId, within_s: float) -> bool:
    """Whether each of its bundles has a node; those of a node that died look for another one."""
    until = time.monotonic() + within_s
    while placement_group_table(room_of(group))["state"] != "CREATED":
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.1)
    return True


def room_of(group: GroupId) -> Any:
    """Its placement group. Raises ValueError if there is none."""
    return ray.util.get_placement_group(str(group))


def make_stage(spec: StageSpec, place: Place, room: Any, wants: Resources) -> RayStage:
    """A process that may become this stage, or another one."""
    made = StageActor.options(
        name=place.actor,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=SPARE_CPUS,  # its bundle is its own, and may be one that was made for a spare
        num_gpus=wants.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=place.bundle),
        # Spinning OpenMP threads of one stage would steal the cores of the next: 3-15x slower, measured.
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(wants.threads)}},
    ).remote(spec)
    return RayStage(made)


def make_head(spec: HeadSpec, place: Place, room: Any) -> Any:
    """A Head, beside some stage."""
    return HeadActor.options(
        name=place.actor,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=place.bundle),
    ).remote(spec)


def find_stage(place: Place) -> RayStage | None:
    """The living stage or spare that was made for this place."""
    actor = find_actor(place.actor)
    return None if actor is None else RayStage(actor)


def names_of(group: GroupId) -> list[str]:
    """Its named actors."""
    return [name for name in _named_actors() if GroupId.of(name) == group]


def known_groups(version: str) -> set[GroupId]:
    """Pipelines of this version that have an actor or a placement group, whole or not."""
    return {group for group in _all_groups() if group.version == version}


def placed_groups(version: str) -> set[GroupId]:
    """Those that have all the room they need."""
    made = (GroupId.of(g["name"]) for g in placement_group_table().values() if g["name"] and g["state"] == "CREATED")
    return {group for group in made if group is not None and group.version == version}


def other_groups(version: str) -> set[GroupId]:
    """Those of every other version."""
    return {group for group in _all_groups() if group.version != version}


def _all_groups() -> set[GroupId]:
    names = _named_actors()
    names += [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return {group for name in names if name and (group := GroupId.of(name)) is not None}


def supervisors() -> dict[str, Any]:
    """Those of every version, by name."""
    found = {name: find_actor(name) for name in _named_actors() if is_supervisor(name)}
    return {name: actor for name, actor in found.items() if actor is not None}


def tear_down(group: GroupId) -> None:
    """Every actor of this pipeline is killed and its placement group removed; nothing happens if there is none."""
    for name in names_of(group):
        kill_actor(find_actor(name))
    for made in placement_group_table().values():
        if made["name"] == str(group) and made["state"] != "REMOVED":
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
