"""One pipeline on the cluster: built whole or not at all, and repaired part by part.

What dies is replaced alone: by a spare that waits, or by a new process in its place. Whoever lives keeps its layers and
forgets the rest; then all are joined anew in the next epoch, and the Head goes on with every request it holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from serve_app.choices import index_of, store_of
from serve_app.cluster.actors import (
    kill_processes,
    make_head,
    make_room,
    make_stage,
    room_of,
    tear_down,
)
from serve_app.cluster.audit_specs import audit_plan
from serve_app.cluster.enrol import enrol
from serve_app.cluster.named_actors import find_actor, kill_actor
from serve_app.cluster.resources import loads_of, pages_of, resources_of
from serve_app.cluster.specs import GroupPlan, HeadSpec, Place, StageReport, StageSpec, Trouble, actor_name
from serve_app.cluster.wiring import HEAD, Member, Party, wire
from serve_app.config import AppConfig
from serve_app.engine.engine import ActivationDtype
from serve_app.errors import PipelineError
from serve_app.transport.link import LinkAddress
from shard_tools.catalog import find_model
from shard_tools.errors import LlmdError
from shard_tools.index.seen import SeenVersions
from shard_tools.manifest import Manifest
from shard_tools.placement.even import plan as plan_evenly
from shard_tools.placement.min_max import plan as plan_by_weight
from shard_tools.signing import Envelope

_log = logging.getLogger(__name__)

_LOAD_S = 1800.0  # for all stages to load: 140 GB at 100 MB/s
_START_S = 60.0  # for a new process; of a node that is gone its bundle may find no other
_ADOPT_S = 5.0


@dataclass(frozen=True, slots=True)
class PipelineGroup:
    """Handles of a pipeline that has generated a token. None: of an actor that is gone."""

    spec: HeadSpec
    head_place: Place
    stages: tuple[Any | None, ...]
    spares: tuple[Any | None, ...]
    head: Any | None
    address: LinkAddress | None  # where the Head listens, if there is one

    @property
    def group(self) -> int:
        """Its number."""
        return self.spec.plan.group

    @property
    def epoch(self) -> int:
        """Of its session keys and edges."""
        return self.spec.epoch

    def parts(self) -> dict[str, tuple[Any | None, Place]]:
        """Who must live, by the names that edges know."""
        found = {f"stage {i}": part for i, part in enumerate(zip(self.stages, self.spec.plan.places, strict=True))}
        return found | {HEAD: (self.head, self.head_place)}


async def build_group(config: AppConfig, group: int) -> PipelineGroup:
    """Place, load, connect, and generate a first token.

    Raises LlmdError saying what is missing; what had been made is then gone again.
    """
    try:
        return await _build(config, group)
    except BaseException as e:
        tear_down(group)
        if isinstance(e, RayError):
            raise PipelineError(f"a part of the pipeline could not start: {_cause(e)}") from e
        raise


async def adopt_group(config: AppConfig, group: int, names: Collection[str]) -> PipelineGroup | None:
    """The pipeline of this number, if its Head works and was made for this configuration; stages may be missing."""
    heads = sorted((name for name in names if "-head-" in name), key=lambda name: int(name.rsplit("-", 1)[1]))
    head = find_actor(heads[-1]) if heads else None
    try:
        async with asyncio.timeout(_ADOPT_S):
            if head is None:
                return None
            address, spec, place = await head.serving.remote()
    except (RayError, TimeoutError):
        return None
    if address is None or spec.config_digest != digest_of(config):
        return None
    stages, spares = ([find_actor(p.actor) for p in places] for places in (spec.plan.places, spec.plan.spares))
    return PipelineGroup(spec, place, tuple(stages), tuple(spares), head, address)


class BrokenError(PipelineError):
    """A repair that did not come to its end."""

    def __init__(self, why: str, group: PipelineGroup, dead: frozenset[str]) -> None:
        """group: as far as it came; dead: which of its parts are known not to live."""
        super().__init__(why)
        self.group, self.dead = group, dead


async def repair_group(config: AppConfig, group: PipelineGroup, dead: Collection[str]) -> PipelineGroup:
    """The pipeline with these parts replaced, and all of it in the next epoch. Raises BrokenError.

    dead: names as in PipelineGroup.parts. They are killed first, should they live.
    """
    began = time.monotonic()
    parts = group.parts()
    for name in dead:
        kill_actor(parts[name][0])
    await kill_processes([parts[name][1] for name in dead])
    try:
        group = _replaced(group, dead)
        async with asyncio.timeout(_LOAD_S):
            reports = await _take_places(group)
            loaded = time.monotonic()
            group = _with_reports(group, reports)
            made = await _lead(config, group, reports)
    except (LlmdError, RayError, TimeoutError, ValueError) as e:
        if isinstance(e, BrokenError):
            raise
        raise BrokenError(_cause(e) if isinstance(e, RayError) else str(e), group, frozenset()) from e
    _log.warning(
        "pipeline %d goes on in epoch %d; replaced: %s; %.1f s to load, %.1f s to join",
        made.group,
        made.epoch,
        ", ".join(sorted(dead)) or "nothing",
        loaded - began,
        time.monotonic() - loaded,
    )
    return made


async def replenish(config: AppConfig, group: PipelineGroup) -> PipelineGroup:
    """The pipeline with as many spares as it is to have, in bundles that nobody uses. Raises RayError, ValueError."""
    plan = group.spec.plan
    alive = [(place, actor) for place, actor in zip(plan.spares, group.spares, strict=True) if actor is not None]
    n_bundles = len(plan.places) + config.pipeline.spares
    free = sorted(set(range(n_bundles)) - {p.bundle for p in plan.places} - {p.bundle for p, _ in alive})
    if group.head is None or not free:
        return group
    room = room_of(group.group)
    for bundle in free:
        covered = [place.prepared_for for place, _ in alive]
        stage = min(range(len(plan.stages)), key=covered.count)
        place = Place(actor_name(group.group, f"spare-{bundle}", int(time.time())), bundle, prepared_for=stage)
        actor = make_stage(plan.stages[stage], place, room, plan.wants)
        actor.prepare.remote(plan.dtype)
        alive.append((place, actor))
    spec = replace(group.spec, plan=replace(plan, spares=tuple(place for place, _ in alive)))
    await group.head.know.remote(spec)
    return replace(group, spec=spec, spares=tuple(actor for _, actor in alive))


def _replaced(group: PipelineGroup, dead: Collection[str]) -> PipelineGroup:
    """With an actor in each place, none of which has taken it in the new epoch; no Head if that is dead."""
    epoch = max(int(time.time()), group.epoch + 1)
    plan = group.spec.plan
    actors, places = list(group.stages), list(plan.places)
    waiting = [(p, actor) for p, actor in zip(plan.spares, group.spares, strict=True) if actor is not None]
    for i in range(len(actors)):
        if f"stage {i}" not in dead and actors[i] is not None:
            continue
        if waiting:
            best = next((w for w in waiting if w[0].prepared_for == i), waiting[0])
            waiting.remove(best)
            places[i], actors[i] = best
        else:
            places[i] = Place(actor_name(group.group, f"stage-{i}", epoch), places[i].bundle)
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


def digest_of(config: AppConfig) -> str:
    """Tells configurations apart that need different pipelines."""
    return hashlib.sha256(repr((config.model, config.pipeline, config.audit, config.identity)).encode()).hexdigest()


async def _build(config: AppConfig, group: int) -> PipelineGroup:
    store = store_of(config.model.store)
    trusted = config.model.publishers()
    seen = SeenVersions(config.identity.seen)
    record, manifest = find_model(config.model.name, index_of(config.model), store, trusted, int(time.time()), seen)
    n_stages, n_spares = config.pipeline.stages, config.pipeline.spares
    wants = resources_of(config)
    # Stages on the cores of one host take turns: then only the sum of what they cost matters.
    on_gpus = wants.device == "cuda"
    spans = plan_by_weight(manifest, n_stages) if on_gpus else plan_evenly(manifest.n_layers, n_stages)
    room = await make_room(group, n_stages, n_spares, wants, config.pipeline.node_labels)
    stages = tuple(
        StageSpec(
            epoch=group,
            stage=i,
            n_stages=n_stages,
            start=start,
            stop=stop,
            manifest=record.manifest,
            signature=record.signature,
            trusted=trusted,
            store=config.model.store,
            engine=config.pipeline.engine,
            deterministic=config.pipeline.deterministic,
            kv_dtype=config.pipeline.kv_dtype,
            device=wants.device,
            page_size=config.pipeline.page_size,
            threads=wants.threads,
            state_dir=config.identity.state_dir,
            session_lifetime_s=config.identity.session_lifetime_s,
            retain_bytes=config.audit.retain_bytes if config.audit.on else 0,
        )
        for i, (start, stop) in enumerate(spans)
    )
    places = [Place(actor_name(group, f"stage-{i}", group), i) for i in range(n_stages)]
    waiting = [
        Place(actor_name(group, f"spare-{i}", group), n_stages + i, prepared_for=i % n_stages) for i in range(n_spares)
    ]
    actors = [make_stage(spec, place, room, wants) for spec, place in zip(stages, places, strict=True)]
    spares = [make_stage(stages[place.prepared_for], place, room, wants) for place in waiting]
    async with asyncio.timeout(_LOAD_S):
        dtype = await _activation_dtype(config, manifest, actors)
        reports = await asyncio.gather(*(a.take.remote(spec, dtype) for a, spec in zip(actors, stages, strict=True)))
    plan = GroupPlan(group, stages, tuple(places), tuple(waiting), wants, dtype)
    max_step_tokens, max_requests = loads_of(config, wants.device)
    spec = HeadSpec(
        plan=plan,
        epoch=group,
        config_digest=digest_of(config),
        manifest=record.manifest,
        n_stages=n_stages,
        context_length=manifest.context_length,
        vocab_size=manifest.vocab_size,
        n_pages=pages_of(config, manifest, reports, max_requests),
        page_size=config.pipeline.page_size,
        max_step_tokens=max_step_tokens,
        max_requests=max_requests,
        take_turns=wants.device == "cpu" and len({r.party.ray_node for r in reports}) == 1,
        max_waiting=config.pipeline.max_waiting,
        prefix_cache=config.pipeline.prefix_cache,
        speculate=config.pipeline.speculate,
        certificates=tuple(r.certificate for r in reports),
        registry=_enrol(config, reports, None),
        state_dir=config.identity.state_dir,
        session_lifetime_s=config.identity.session_lifetime_s,
        audit=audit_plan(config.audit, manifest, dtype),
    )
    whole = PipelineGroup(spec, places[0], tuple(actors), tuple(spares), None, None)
    async with asyncio.timeout(_LOAD_S):
        made = await _lead(config, _with_reports(whole, reports), reports)
    for spare in spares:
        spare.prepare.remote(dtype)  # not waited for: until it has, it is only slower
    return made


async def _take_places(group: PipelineGroup) -> Sequence[StageReport]:
    """Every stage has its layers, and is in the group's epoch. Raises BrokenError naming those that are of no use."""
    plan = group.spec.plan

    async def take(actor: Any, spec: StageSpec) -> StageReport:
        async with asyncio.timeout(_START_S):
            await actor.ready.remote()
        report: StageReport = await actor.take.remote(spec, plan.dtype)
        return report

    taken = [take(actor, spec) for actor, spec in zip(group.stages, plan.stages, strict=True)]
    reports = await asyncio.gather(*taken, return_exceptions=True)
    failed = {f"stage {i}": e for i, e in enumerate(reports) if isinstance(e, BaseException)}
    if failed:
        why = "; ".join(f"{name}: {_cause(e)}" for name, e in failed.items())
        raise BrokenError(why, group, frozenset(failed))
    return [report for report in reports if isinstance(report, StageReport)]


def _with_reports(group: PipelineGroup, reports: Sequence[StageReport]) -> PipelineGroup:
    """With the processes that are its stages now, and their certificates."""
    plan = group.spec.plan
    found = zip(plan.places, reports, strict=True)
    places = tuple(replace(place, pid=r.party.pid, ray_node=r.party.ray_node) for place, r in found)
    certificates = tuple(report.certificate for report in reports)
    return replace(group, spec=replace(group.spec, plan=replace(plan, places=places), certificates=certificates))


def _enrol(config: AppConfig, reports: Sequence[StageReport], head: Party | None) -> Envelope:
    nodes = {r.party.node: r.host for r in reports}
    if head is not None:
        nodes.setdefault(head.node, head.address)
    return enrol(
        nodes,
        state_dir=config.identity.state_dir,
        operator_key=config.identity.operator_key,
        registry=config.identity.registry,
    )


async def _lead(config: AppConfig, group: PipelineGroup, reports: Sequence[StageReport]) -> PipelineGroup:
    """The Head leads these stages: a new one, which has generated a token, or the one there is, with its requests."""
    head, place, spec = group.head, group.head_place, group.spec
    if head is None:
        place = Place(actor_name(group.group, "head", spec.epoch), spec.plan.places[0].bundle)
        head = make_head(spec, place, room_of(group.group))
    async with asyncio.timeout(_START_S):
        party: Party = await head.party.remote()
    place = replace(place, pid=party.pid, ray_node=party.ray_node)
    spec = replace(spec, registry=_enrol(config, reports, party))
    await head.lead.remote(spec)
    members = [Member(report.party, actor) for report, actor in zip(reports, group.stages, strict=True)]
    await wire(config.pipeline.edges, spec.epoch, Member(party, head), members, spec.n_pages, spec.max_requests)
    if group.head is None:
        address = await _first_token(head, place, spec.epoch)
    else:
        address = await head.resume.remote()
    return replace(group, spec=spec, head=head, head_place=place, address=address)


async def _first_token(head: Any, place: Place, epoch: int) -> LinkAddress:
    started = asyncio.ensure_future(head.start.remote(place))
    trouble = asyncio.ensure_future(head.trouble.remote(epoch))
    try:
        await asyncio.wait((started, trouble), return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            said: Trouble = trouble.result()
            raise PipelineError(f"the pipeline broke before its first token: {said.why}")
        address: LinkAddress = started.result()
        return address
    finally:
        started.cancel()
        trouble.cancel()


async def _activation_dtype(config: AppConfig, manifest: Manifest, stages: Sequence[Any]) -> ActivationDtype:
    """What all stages compute in: neighbours must agree, so one host without the arithmetic decides for all."""
    match config.pipeline.dtype:
        case "manifest":
            return manifest.dtype
        case "auto":
            fast = await asyncio.gather(*(stage.computes_fast_in.remote(manifest.dtype) for stage in stages))
            return manifest.dtype if all(fast) else "float32"
        case given:
            return given


def _cause(error: BaseException) -> str:
    """The last line of an error in an actor: Ray's message holds the whole remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
