"""What dies of a pipeline is replaced alone: by a spare that waits, or by a new process in its place.

Whoever lives keeps its layers and forgets the rest; then all are joined anew in the next epoch, and the Head goes on
with every request it holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from ray.exceptions import RayError

from serve_app.cluster.actors import has_room, kill_processes, make_stage, room_of
from serve_app.cluster.named_actors import cause_of, kill_actor
from serve_app.cluster.outside import returned
from serve_app.cluster.pipeline_group import BrokenError, PipelineGroup, lead, take_places, with_reports
from serve_app.cluster.specs import Place
from serve_app.cluster.stage_handle import RayStage
from serve_app.cluster.wiring import HEAD
from serve_app.config import AppConfig
from serve_app.errors import NoRoomError, PipelineError
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)
_PLACE_S = 60.0  # for a node to come in place of one that died, where nothing else is to be done
_HOLD_S = 1.0
_SPARE_S = 1.0  # one that loads answers all the same
_JOIN_S = 120.0  # to join all anew: a new process on a GPU compiles and captures its graphs meanwhile


async def repair_group(config: AppConfig, group: PipelineGroup, dead: Collection[str]) -> PipelineGroup:
    """The pipeline with these parts replaced, and all of it in the next epoch. Raises BrokenError.

    dead: names as in PipelineGroup.places. They are killed first, should they live; those outside are waited for.
    """
    noticed = time.time()
    dead = frozenset(dead) - await returned(group.stages, dead)
    began = time.monotonic()
    if HEAD not in dead:
        await _hold(group)
    actors = {f"stage {i}": stage.actor for i, stage in enumerate(group.stages) if stage is not None}
    for name in dead:
        kill_actor(group.head if name == HEAD else actors.get(name))
    await kill_processes([place for name, place in group.places().items() if name in dead])
    kept = actors.keys() - set(dead)
    try:
        group = _replaced(group, dead, await _answering(group.spares))
        fewer = config.pipeline.stages_at_least is not None
        if not await has_room(group.group, config.pipeline.beside_s if fewer else _PLACE_S):
            raise NoRoomError(f"the cluster has no room in place of {', '.join(sorted(dead))}")
        reports = await take_places(group, kept)
        loaded = time.monotonic()
        group = with_reports(group, reports)
        async with asyncio.timeout(_JOIN_S):
            made = await lead(config, group, reports)
    except (LlmdError, RayError, TimeoutError, ValueError) as e:
        if isinstance(e, BrokenError):
            raise
        raise BrokenError(cause_of(e), group, frozenset()) from e
    _log.warning(
        "%s goes on in epoch %d; replaced: %s; noticed at %.2f, %.2f s to load, %.2f s to join",
        made.group,
        made.epoch,
        ", ".join(sorted(dead)) or "nothing",
        noticed,
        loaded - began,
        time.monotonic() - loaded,
    )
    return made


async def _hold(group: PipelineGroup) -> None:
    """Requests wait. Else the first stage that is taken from a running pipeline would report a fault, and end them."""
    with suppress(RayError, TimeoutError):  # whether it lives is another's affair
        async with asyncio.timeout(_HOLD_S):
            if group.head is not None:
                await group.head.hold.remote("a part of the pipeline is replaced")


async def replenish(config: AppConfig, group: PipelineGroup) -> PipelineGroup:
    """The pipeline with as many spares as it is to have, in bundles that nobody uses. Raises RayError, ValueError."""
    plan = group.spec.plan
    alive = [(place, actor) for place, actor in zip(plan.spares, group.spares, strict=True) if actor is not None]
    n_bundles = len(plan.places) + config.pipeline.spares
    taken = {p.bundle for p in plan.places} | {p.bundle for p, _ in alive} | config.pipeline.roomless
    free = sorted(set(range(n_bundles)) - taken)
    if group.head is None or not free:
        return group
    room = room_of(group.group)
    for bundle in free:
        covered = [place.prepared_for for place, _ in alive]
        stage = min(range(len(plan.stages)), key=covered.count)
        place = Place(group.group.actor(f"spare-{bundle}", int(time.time())), bundle, prepared_for=stage)
        actor = make_stage(plan.stages[stage], place, room, plan.wants)
        actor.prepare(plan.dtype)
        alive.append((place, actor))
    spec = replace(group.spec, plan=replace(plan, spares=tuple(place for place, _ in alive)))
    await group.head.know.remote(spec)
    return replace(group, spec=spec, spares=tuple(actor for _, actor in alive))


async def _answering(spares: Sequence[RayStage | None]) -> tuple[bool, ...]:
    """Those that can take a place now. One that is stopped may go on one day, and is no help today."""

    async def ask(spare: RayStage | None) -> bool:
        try:
            async with asyncio.timeout(_SPARE_S):
                if spare is not None:
                    await spare.ready()
        except (RayError, TimeoutError):
            return False
        return spare is not None

    return tuple(await asyncio.gather(*(ask(spare) for spare in spares)))


def _replaced(group: PipelineGroup, dead: Collection[str], fit: Sequence[bool]) -> PipelineGroup:
    """With an actor in each place, none of which has taken it in the new epoch; no Head if that is dead.

    fit: which of the spares may be used.
    """
    epoch = max(int(time.time()), group.epoch + 1)
    plan = group.spec.plan
    actors, places = list(group.stages), list(plan.places)
    waiting = [(p, actor) for p, actor in zip(plan.spares, group.spares, strict=True) if actor is not None]
    usable = [place for place, answers in zip(plan.spares, fit, strict=True) if answers]
    for i in range(len(actors)):
        if f"stage {i}" not in dead and actors[i] is not None:
            continue
        if able := [w for w in waiting if w[0] in usable]:
            best = next((w for w in able if w[0].prepared_for == i), able[0])
            waiting.remove(best)
            places[i], actors[i] = best
        elif (outside := places[i].outside) is not None and not outside.stand_in:
            raise PipelineError(f"stage {i} at {outside.host}:{outside.port} is gone, and nothing may stand in for it")
        else:
            places[i] = Place(group.group.actor(f"stage-{i}", epoch), places[i].bundle)
            actors[i] = make_stage(plan.stages[i], places[i], room_of(group.group), plan.wants)
    plan = replace(
        plan,
        stages=tuple(replace(spec, epoch=epoch) for spec in plan.stages),
        places=tuple(places),
        spares=tuple(place for place, _ in waiting),
    )
    return replace(
        group,
        spec=replace(group.spec, plan=plan, epoch=epoch),
        stages=tuple(actors),
        spares=tuple(actor for _, actor in waiting),
        head=None if HEAD in dead else group.head,
    )
