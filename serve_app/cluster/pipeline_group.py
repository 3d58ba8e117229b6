"""One pipeline on the cluster: built whole or not at all, and how its parts are joined, at first and in every epoch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from serve_app.choices import store_of
from serve_app.cluster.actors import (
    find_stage,
    make_head,
    make_room,
    make_stage,
    room_of,
    tear_down,
)
from serve_app.cluster.audit_specs import audit_plan
from serve_app.cluster.enrol import enrol
from serve_app.cluster.named_actors import cause_of, find_actor, kill_actor
from serve_app.cluster.outside import outside_stages, present_outside
from serve_app.cluster.resources import activation_dtype, loads_of, pages_of, resources_of
from serve_app.cluster.specs import GroupId, GroupPlan, HeadSpec, Place, StageReport, StageSpec, Trouble
from serve_app.cluster.stage_handle import RayStage, StageHandle
from serve_app.cluster.wiring import HEAD, Leader, Member, Party, wire
from serve_app.config import AppConfig
from serve_app.errors import PipelineError
from serve_app.transport.link import LinkAddress
from shard_tools.catalog import open_record
from shard_tools.index.model_index import ModelRecord
from shard_tools.placement.even import plan as plan_evenly
from shard_tools.placement.min_max import plan as plan_by_weight
from shard_tools.signing import Envelope

_LOAD_S = 1800.0  # for all stages to load: 140 GB at 100 MB/s
_START_S = 60.0  # for a new process; of a node that is gone its bundle may find no other
_ADOPT_S = 5.0
_KEPT_S = 30.0  # for a stage that lives to forget the epoch before: its step ends within 5 s or it is of no use


@dataclass(frozen=True, slots=True)
class PipelineGroup:
    """Handles of a pipeline that has generated a token. None: of an actor that is gone."""

    spec: HeadSpec
    head_place: Place
    stages: tuple[StageHandle | None, ...]
    spares: tuple[RayStage | None, ...]
    head: Any | None
    address: LinkAddress | None  # where the Head listens, if there is one

    @property
    def group(self) -> GroupId:
        """Its name."""
        return self.spec.plan.group

    @property
    def epoch(self) -> int:
        """Of its session keys and edges."""
        return self.spec.epoch

    def places(self) -> dict[str, Place]:
        """Where those are who must live, by the names that edges know."""
        return {f"stage {i}": place for i, place in enumerate(self.spec.plan.places)} | {HEAD: self.head_place}


async def build_group(
    config: AppConfig, group: GroupId, record: ModelRecord, crowded: Callable[[], Awaitable[bool]]
) -> PipelineGroup:
    """Place, load, connect, and generate a first token.

    record: of the model. crowded: as make_room. Raises LlmdError saying what is missing; what had been made is then
    gone again.
    """
    try:
        return await _build(config, group, record, crowded)
    except BaseException as e:
        tear_down(group)
        if isinstance(e, RayError):
            raise PipelineError(f"a part of the pipeline could not start: {cause_of(e)}") from e
        raise


async def adopt_group(config: AppConfig, names: Collection[str]) -> PipelineGroup | None:
    """The pipeline whose actors these are, if its Head works; stages may be missing."""
    heads = sorted((name for name in names if "-head-" in name), key=lambda name: int(name.rsplit("-", 1)[1]))
    head = find_actor(heads[-1]) if heads else None
    try:
        async with asyncio.timeout(_ADOPT_S):
            if head is None:
                return None
            address, spec, place = await head.serving.remote()
    except (RayError, TimeoutError):
        return None
    if address is None:
        return None
    outside = outside_stages(config)
    stages = [outside[i] if p.outside else find_stage(p) for i, p in enumerate(spec.plan.places)]
    return PipelineGroup(spec, place, tuple(stages), tuple(map(find_stage, spec.plan.spares)), head, address)


class BrokenError(PipelineError):
    """A repair that did not come to its end."""

    def __init__(self, why: str, group: PipelineGroup, dead: frozenset[str]) -> None:
        """group: as far as it came; dead: which of its parts are known not to live."""
        super().__init__(why)
        self.group, self.dead = group, dead


async def _build(
    config: AppConfig, group: GroupId, record: ModelRecord, crowded: Callable[[], Awaitable[bool]]
) -> PipelineGroup:
    epoch = group.number
    trusted = config.model.publishers()
    manifest = open_record(record, store_of(config.model.store), trusted)
    n_stages, n_spares = config.pipeline.stages, config.pipeline.spares
    wants = resources_of(config)
    # Stages on the cores of one host take turns: then only the sum of what they cost matters.
    on_gpus = wants.device == "cuda"
    spans = plan_by_weight(manifest, n_stages) if on_gpus else plan_evenly(manifest.n_layers, n_stages)
    asked = config.pipeline
    room = await make_room(group, n_stages, n_spares, wants, asked.node_labels, asked.roomless, asked.beside_s, crowded)
    stages = tuple(
        StageSpec(
            epoch=epoch,
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
    outside = await present_outside(config)
    places = [
        Place("", i, outside=outside[i].who) if i in outside else Place(group.actor(f"stage-{i}", epoch), i)
        for i in range(n_stages)
    ]
    waiting = [
        Place(group.actor(f"spare-{i}", epoch), n_stages + i, prepared_for=i % n_stages) for i in range(n_spares)
    ]
    actors: list[StageHandle] = [
        outside[i] if i in outside else make_stage(spec, places[i], room, wants) for i, spec in enumerate(stages)
    ]
    spares = [make_stage(stages[place.prepared_for], place, room, wants) for place in waiting]
    async with asyncio.timeout(_LOAD_S):
        dtype = await activation_dtype(config, manifest, actors)
        reports = await asyncio.gather(*(a.take(spec, dtype) for a, spec in zip(actors, stages, strict=True)))
    plan = GroupPlan(group, stages, tuple(places), tuple(waiting), wants, dtype)
    max_step_tokens, max_requests = loads_of(config, wants.device)
    spec = HeadSpec(
        plan=plan,
        epoch=epoch,
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
        made = await lead(config, with_reports(whole, reports), reports)
    for spare in spares:
        spare.prepare(dtype)
    return made


async def take_places(group: PipelineGroup, kept: Collection[str]) -> Sequence[StageReport]:
    """Every stage has its layers, and is in the group's epoch. Raises BrokenError naming those that are of no use.

    kept: stages that hold their layers since the epoch before, and are therefore not waited for long.
    """
    plan = group.spec.plan

    async def take(stage: StageHandle, spec: StageSpec) -> StageReport:
        async with asyncio.timeout(_START_S):
            await stage.ready()
        async with asyncio.timeout(_KEPT_S if f"stage {spec.stage}" in kept else _LOAD_S):
            return await stage.take(spec, plan.dtype)

    taken = [take(stage, spec) for stage, spec in zip(all_there(group.stages), plan.stages, strict=True)]
    reports = await asyncio.gather(*taken, return_exceptions=True)
    failed = {f"stage {i}": e for i, e in enumerate(reports) if isinstance(e, BaseException)}
    if failed:
        why = "; ".join(f"{name}: {cause_of(e)}" for name, e in failed.items())
        raise BrokenError(why, group, frozenset(failed))
    return [report for report in reports if isinstance(report, StageReport)]


def with_reports(group: PipelineGroup, reports: Sequence[StageReport]) -> PipelineGroup:
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


async def lead(config: AppConfig, group: PipelineGroup, reports: Sequence[StageReport]) -> PipelineGroup:
    """The Head leads these stages: a new one, which has generated a token, or the one there is, with its requests."""
    if group.head is not None:
        return await _join(config, group, reports, group.head, group.head_place)
    place = Place(group.group.actor("head", group.epoch), group.spec.plan.places[0].bundle)
    head = make_head(group.spec, place, room_of(group.group))
    try:
        return await _join(config, group, reports, head, place)
    except BaseException:
        kill_actor(head)  # nobody else knows of it, and the next attempt makes its own
        raise


async def _join(
    config: AppConfig, group: PipelineGroup, reports: Sequence[StageReport], head: Any, place: Place
) -> PipelineGroup:
    spec = group.spec
    async with asyncio.timeout(_START_S):
        party: Party = await head.party.remote()
    place = replace(place, pid=party.pid, ray_node=party.ray_node)
    spec = replace(spec, registry=_enrol(config, reports, party))
    await head.lead.remote(spec)
    members = [Member(report.party, stage) for report, stage in zip(reports, all_there(group.stages), strict=True)]
    leader, deliveries = Leader(party, head), config.audit.deliveries
    await wire(config.pipeline.edges, spec.epoch, leader, members, spec.n_pages, spec.max_requests, deliveries)
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


def all_there(stages: Sequence[StageHandle | None]) -> list[StageHandle]:
    """Of a group whose every place is filled."""
    found = [stage for stage in stages if stage is not None]
    assert len(found) == len(stages)
    return found
