"""One pipeline on the cluster: a detached placement group, its stage actors, its Head. Built whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.choices import index_of, store_of
from serve_app.cluster.enrol import enrol
from serve_app.cluster.head_actor import HeadActor
from serve_app.cluster.specs import NAMESPACE, HeadSpec, StageReport, StageSpec, head_name, stage_name
from serve_app.cluster.stage_actor import StageActor
from serve_app.cluster.wiring import Member, Party, wire
from serve_app.config import AppConfig
from serve_app.engine.engine import ActivationDtype, DeviceName
from serve_app.errors import PipelineError
from serve_app.transport.link import LinkAddress
from shard_tools.catalog import find_model
from shard_tools.index.seen import SeenVersions
from shard_tools.manifest import Manifest
from shard_tools.placement.even import plan as plan_evenly
from shard_tools.placement.min_max import plan as plan_by_weight
from shard_tools.signing import key_text

_log = logging.getLogger(__name__)

_PLACE_S = 60.0  # for the cluster to find room; a missing GPU would otherwise be waited for in silence
_LOAD_S = 1800.0  # for all stages to load: 140 GB at 100 MB/s
_ADOPT_S = 5.0
_HEAD_CPUS = 0.1  # it plans and hashes; on a two-core laptop whole CPUs would not fit
_STAGE_CPU_SHARE = 0.8  # of the CPUs that would be a stage's, so that ingress and Head find room
_AUTO_LOADS: dict[DeviceName, tuple[int, int]] = {"cpu": (512, 64), "cuda": (8192, 256)}  # as config.py says
_GPU_KV_SHARE = 0.85  # of what is free once the weights are loaded; the rest is for activations


@dataclass(frozen=True, slots=True)
class PipelineGroup:
    """Handles of a pipeline that has generated a token."""

    epoch: int
    stages: tuple[Any, ...]
    head: Any
    address: LinkAddress


@dataclass(frozen=True, slots=True)
class _Resources:
    """What each stage asks Ray for."""

    device: DeviceName
    cpus: float
    gpus: float
    threads: int


async def build_group(config: AppConfig, epoch: int) -> PipelineGroup:
    """Place, load, connect, and generate a first token.

    Raises LlmdError saying what is missing; what had been made is then gone again.
    """
    try:
        return await _build(config, epoch)
    except BaseException as e:
        tear_down(epoch)
        if isinstance(e, RayError):
            raise PipelineError(f"a part of the pipeline could not start: {_cause(e)}") from e
        raise


async def adopt_group(config: AppConfig, epoch: int) -> PipelineGroup | None:
    """The pipeline of this epoch if it is whole, works, and was made for this configuration."""
    try:
        head = ray.get_actor(head_name(epoch), NAMESPACE)
        stages = tuple(ray.get_actor(stage_name(epoch, i), NAMESPACE) for i in range(config.pipeline.stages))
        async with asyncio.timeout(_ADOPT_S):
            address, digest = await head.serving.remote()
    except (ValueError, RayError, TimeoutError):
        return None
    return PipelineGroup(epoch, stages, head, address) if address and digest == digest_of(config) else None


def digest_of(config: AppConfig) -> str:
    """Tells configurations apart that need different pipelines."""
    return hashlib.sha256(repr((config.model, config.pipeline, config.identity)).encode()).hexdigest()


def tear_down(epoch: int) -> None:
    """Every actor of this pipeline is killed and its placement group removed; nothing happens if there is none."""
    prefix = f"llmd-{epoch}-"
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix):
            try:
                ray.kill(ray.get_actor(actor["name"], NAMESPACE))
            except (ValueError, RayError):
                _log.debug("%s was gone already", actor["name"])
    for group in placement_group_table().values():
        if group["name"] == f"llmd-{epoch}" and group["state"] != "REMOVED":
            remove_placement_group(ray.util.get_placement_group(group["name"]))


def known_epochs() -> set[int]:
    """Pipelines that have an actor or a placement group, whole or not."""
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    names += [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    parts = [name.split("-") for name in names if name]
    return {int(p[1]) for p in parts if p[0] == "llmd" and len(p) > 1 and p[1].isdigit()}


async def _build(config: AppConfig, epoch: int) -> PipelineGroup:
    store = store_of(config.model.store)
    trusted = config.model.publishers()
    seen = SeenVersions(config.identity.seen)
    record, manifest = find_model(config.model.name, index_of(config.model), store, trusted, int(time.time()), seen)
    n_stages = config.pipeline.stages
    wants = _resources(config)
    # Stages on the cores of one host take turns: then only the sum of what they cost matters.
    on_gpus = wants.device == "cuda"
    spans = plan_by_weight(manifest, n_stages) if on_gpus else plan_evenly(manifest.n_layers, n_stages)
    group = await _place(epoch, n_stages, wants, config.pipeline.node_labels)
    specs = [
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
        )
        for i, (start, stop) in enumerate(spans)
    ]
    stages = [_stage_actor(spec, group, wants) for spec in specs]
    async with asyncio.timeout(_LOAD_S):
        dtype = await _activation_dtype(config, manifest, stages)
        reports: Sequence[StageReport] = await asyncio.gather(*(stage.load.remote(dtype) for stage in stages))
    nodes = {r.party.node: r.host for r in reports}
    registry = enrol(
        nodes,
        state_dir=config.identity.state_dir,
        operator_key=config.identity.operator_key,
        registry=config.identity.registry,
    )
    max_step_tokens, max_requests = _loads(config, wants.device)
    n_pages = _pages(config, manifest, reports, max_requests)
    spec = HeadSpec(
        epoch=epoch,
        config_digest=digest_of(config),
        manifest=record.manifest,
        n_stages=n_stages,
        context_length=manifest.context_length,
        vocab_size=manifest.vocab_size,
        n_pages=n_pages,
        page_size=config.pipeline.page_size,
        max_step_tokens=max_step_tokens,
        max_requests=max_requests,
        take_turns=wants.device == "cpu" and len({r.party.ray_node for r in reports}) == 1,
        max_waiting=config.pipeline.max_waiting,
        prefix_cache=config.pipeline.prefix_cache,
        certificates=tuple(r.certificate for r in reports),
        registry=registry,
        state_dir=config.identity.state_dir,
        session_lifetime_s=config.identity.session_lifetime_s,
    )
    head = HeadActor.options(
        name=spec.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=_HEAD_CPUS,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    ).remote(spec)
    party: Party = await head.party.remote()
    if party.node not in nodes:
        # It shares a bundle, and so a host, with stage 0: a registered node, or receipts would not verify either.
        raise PipelineError(f"the head runs on a node that is none of the stages' ({key_text(party.node)})")
    async with asyncio.timeout(_LOAD_S):
        members = [Member(report.party, actor) for report, actor in zip(reports, stages, strict=True)]
        await wire(config.pipeline.edges, Member(party, head), members, n_pages, max_requests)
        address: LinkAddress = await head.start.remote()
    return PipelineGroup(epoch, tuple(stages), head, address)


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


async def _place(epoch: int, n_stages: int, wants: _Resources, labels: dict[str, str]) -> Any:
    bundles = [{"CPU": wants.cpus} | ({"GPU": wants.gpus} if wants.gpus else {}) for _ in range(n_stages)]
    bundles[0]["CPU"] += _HEAD_CPUS
    extra: dict[str, Any] = {"bundle_label_selector": [labels] * n_stages} if labels else {}
    group = placement_group(bundles, strategy="PACK", name=f"llmd-{epoch}", lifetime="detached", **extra)
    try:
        async with asyncio.timeout(_PLACE_S):
            await group.ready()
    except TimeoutError as e:
        raise PipelineError(
            f"no room for {n_stages} stages of {bundles[-1]} within {_PLACE_S:.0f} s; free in the cluster: "
            f"{_brief(ray.available_resources())} of {_brief(ray.cluster_resources())}. "
            f"Add nodes, or lower pipeline.stages or pipeline.threads_per_stage."
        ) from e
    return group


def _stage_actor(spec: StageSpec, group: Any, wants: _Resources) -> Any:
    return StageActor.options(
        name=spec.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=wants.cpus,
        num_gpus=wants.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=spec.stage),
        # Spinning OpenMP threads of one stage would steal the cores of the next: 3-15x slower, measured.
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(wants.threads)}},
    ).remote(spec)


def _resources(config: AppConfig) -> _Resources:
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return _wanted(config, nodes, ray.cluster_resources().get("GPU", 0.0))


def _wanted(config: AppConfig, node_cpus: Sequence[float], gpus_there: float) -> _Resources:
    """node_cpus: CPUs of each node. A stage never asks for more than the largest node can give it."""
    stages = config.pipeline.stages
    with_cpus = [cpus for cpus in node_cpus if cpus > 0] or [1.0]
    beside = -(-stages // len(with_cpus))  # stages on one node, if they spread
    fair = min(sum(with_cpus) / stages, max(with_cpus) / beside)
    asked = config.pipeline.threads_per_stage
    threads = max(1, int(fair)) if asked == "auto" else asked
    cpus = round(min(float(threads), fair * _STAGE_CPU_SHARE), 2)
    gpus = config.pipeline.gpus_per_stage
    if config.pipeline.device == "cuda" or (config.pipeline.device == "auto" and gpus_there >= gpus * stages):
        return _Resources("cuda", min(cpus, 1.0), gpus, threads)
    if asked == "auto" and len(with_cpus) == 1:
        threads = max(1, int(with_cpus[0]))  # stages of one node take turns (see max_flights): each has all its cores
    return _Resources("cpu", cpus, 0.0, threads)


def _loads(config: AppConfig, device: DeviceName) -> tuple[int, int]:
    """Tokens in a step and requests running at once, at most."""
    step_tokens, requests = _AUTO_LOADS[device]
    asked = config.pipeline.max_step_tokens, config.pipeline.max_requests
    return step_tokens if asked[0] == "auto" else asked[0], requests if asked[1] == "auto" else asked[1]


def _pages(config: AppConfig, manifest: Manifest, reports: Sequence[StageReport], max_requests: int) -> int:
    """KV pages that every stage has room for."""
    if config.pipeline.kv_pages != "auto":
        return config.pipeline.kv_pages
    rooms = []
    for report in reports:
        profile = report.profile
        memory = config.pipeline.kv_memory_bytes
        if profile.device.startswith("cuda"):
            # Of a shared GPU each stage may fill its share only: all of them saw the same memory free.
            memory = int(profile.memory_bytes * _GPU_KV_SHARE * config.pipeline.gpus_per_stage)
        rooms.append(memory // profile.kv_page_bytes)
    # More than all requests at full length can never be used.
    useful = max_requests * -(-manifest.context_length // config.pipeline.page_size)
    pages = min(*rooms, useful)
    if pages < 1:
        raise PipelineError("no room for a single KV page: raise pipeline.kv_memory_bytes")
    return pages


def _cause(error: RayError) -> str:
    """The last line of the error in the actor: Ray's message holds the whole remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _brief(resources: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in sorted(resources.items()) if k in ("CPU", "GPU")) or "nothing"
