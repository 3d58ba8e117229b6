"""What the stages of a pipeline ask of a cluster, and what fits into them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import ray

from serve_app.cluster.specs import GPU_KV_SHARE, GroupPlan, Resources, StageReport
from serve_app.cluster.stage_handle import StageHandle
from serve_app.config import AppConfig
from serve_app.engine.engine import ActivationDtype, DeviceName
from serve_app.errors import PipelineError
from shard_tools.manifest import Manifest

HEAD_CPUS = 0.1  # it plans and hashes; on a two-core laptop whole CPUs would not fit
SPARE_CPUS = 0.05  # one that waits computes nothing; on its GPU nothing else must be when it is needed
_STAGE_CPU_SHARE = 0.8  # of the CPUs that would be a stage's, so that ingress and Head find room
_AUTO_LOADS: dict[DeviceName, tuple[int, int]] = {"cpu": (512, 64), "cuda": (8192, 256)}  # as config.py says


def resources_of(config: AppConfig) -> Resources:
    """For this cluster as it is now."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return wanted(config, nodes, ray.cluster_resources().get("GPU", 0.0))


def wanted(config: AppConfig, node_cpus: Sequence[float], gpus_there: float) -> Resources:
    """node_cpus: CPUs of each node. A stage never asks for more than the largest node can give it."""
    own, replicas = max(1, config.pipeline.stages - len(config.pipeline.roomless)), config.pipeline.replicas
    stages = own * replicas
    with_cpus = [cpus for cpus in node_cpus if cpus > 0] or [1.0]
    beside = -(-stages // len(with_cpus))  # stages on one node, if they spread
    fair = min(sum(with_cpus) / stages, max(with_cpus) / beside)
    asked = config.pipeline.threads_per_stage
    threads = max(1, int(fair)) if asked == "auto" else asked
    cpus = round(min(float(threads), fair * _STAGE_CPU_SHARE), 2)
    gpus = config.pipeline.gpus_per_stage
    if config.pipeline.device == "cuda" or (config.pipeline.device == "auto" and gpus_there >= gpus * own):
        return Resources("cuda", min(cpus, 1.0), gpus, threads)
    if asked == "auto" and len(with_cpus) == 1:
        # Stages of one pipeline on one node take turns (see max_flights): each has all cores that its pipeline has.
        threads = max(1, int(with_cpus[0] / replicas))
    return Resources("cpu", cpus, 0.0, threads)


def fewer_stages(config: AppConfig) -> Iterator[AppConfig]:
    """The configuration, then those with fewer stages that may be tried where there is no room for all."""
    pipeline = config.pipeline
    for stages in range(pipeline.stages, (pipeline.stages_at_least or pipeline.stages) - 1, -1):
        yield replace(config, pipeline=replace(pipeline, stages=stages))


def fits(config: AppConfig, beside: Sequence[GroupPlan]) -> bool:
    """Whether the nodes that live could hold all stages of a pipeline and these others, if nothing else were there.

    Labels are not asked.
    """
    there = ray.cluster_resources()
    asked = [(resources_of(config), config.pipeline.stages, config.pipeline.spares)]
    asked += [(plan.wants, len(plan.stages), len(plan.spares)) for plan in beside]
    cpus = sum(wants.cpus * stages + HEAD_CPUS + SPARE_CPUS * spares for wants, stages, spares in asked)
    gpus = sum(wants.gpus * (stages + spares) for wants, stages, spares in asked)
    return float(there.get("CPU", 0.0)) >= cpus and float(there.get("GPU", 0.0)) >= gpus


def loads_of(config: AppConfig, device: DeviceName) -> tuple[int, int]:
    """Tokens in a step and requests running at once, at most."""
    step_tokens, requests = _AUTO_LOADS[device]
    asked = config.pipeline.max_step_tokens, config.pipeline.max_requests
    return step_tokens if asked[0] == "auto" else asked[0], requests if asked[1] == "auto" else asked[1]


def pages_of(config: AppConfig, manifest: Manifest, reports: Sequence[StageReport], max_requests: int) -> int:
    """KV pages that every stage has room for."""
    if config.pipeline.kv_pages != "auto":
        return config.pipeline.kv_pages
    rooms = []
    for report in reports:
        if report.max_pages is not None:
            rooms.append(report.max_pages)
            continue
        profile = report.profile
        memory = config.pipeline.kv_memory_bytes
        if profile.device.startswith("cuda"):
            # Of a shared GPU each stage may fill its share only: all of them saw the same memory free.
            memory = int(profile.memory_bytes * GPU_KV_SHARE * config.pipeline.gpus_per_stage)
        rooms.append(memory // profile.kv_page_bytes)
    # More than all requests at full length can never be used.
    useful = max_requests * -(-manifest.context_length // config.pipeline.page_size)
    pages = min(*rooms, useful)
    if pages < 1:
        raise PipelineError("no room for a single KV page: raise pipeline.kv_memory_bytes")
    return pages


async def activation_dtype(config: AppConfig, manifest: Manifest, stages: Sequence[StageHandle]) -> ActivationDtype:
    """What all stages compute in: neighbours must agree, so one host without the arithmetic decides for all."""
    match config.pipeline.dtype:
        case "manifest":
            return manifest.dtype
        case "auto":
            fast = await asyncio.gather(*(stage.computes_fast_in(manifest.dtype) for stage in stages))
            return manifest.dtype if all(fast) else "float32"
        case given:
            return given


def brief(resources: dict[str, float]) -> str:
    """For people."""
    return ", ".join(f"{k} {v:g}" for k, v in sorted(resources.items()) if k in ("CPU", "GPU")) or "nothing"
