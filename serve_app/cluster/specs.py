"""What the Supervisor tells the actors it makes: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.cluster.wiring import Party
from serve_app.engine.engine import ActivationDtype, DeviceName, EngineProfile, KvDtype
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.signing import Envelope
from shard_tools.trust import TrustPolicy

NAMESPACE = "llmd"
SUPERVISOR = "llmd-supervisor"


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of one pipeline, in one epoch."""

    epoch: int
    stage: int
    n_stages: int
    start: int
    stop: int
    manifest: Cid
    signature: Cid
    trusted: TrustPolicy
    store: Path | Choice
    engine: Choice
    deterministic: bool
    kv_dtype: KvDtype
    device: DeviceName
    page_size: int
    threads: int
    state_dir: Path
    session_lifetime_s: int
    retain_bytes: int = 0  # of rows, for audits


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage says once its layers are loaded."""

    stage: int
    party: Party
    host: str  # its name, for people and the registry
    profile: EngineProfile
    certificate: Envelope  # of its session, by its node
    load_s: float
    opened_blocks: int  # of weights


@dataclass(frozen=True, slots=True)
class Resources:
    """What each stage asks Ray for."""

    device: DeviceName
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, slots=True)
class Place:
    """An actor, and the bundle of the placement group that it lives in."""

    actor: str  # its name
    bundle: int
    pid: int = 0  # once that is known
    ray_node: str = ""
    prepared_for: int = -1  # of a spare: the stage whose layers it holds


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Which actors are a pipeline, and what each is to be."""

    group: int  # the number of the pipeline, in the names of its actors and its placement group
    stages: tuple[StageSpec, ...]
    places: tuple[Place, ...]  # by stage
    spares: tuple[Place, ...]
    wants: Resources
    dtype: ActivationDtype


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """How the answers of one pipeline are audited. Values as in AuditConfig."""

    rate_micro: int
    on_request: bool
    retain_bytes: int
    row_bytes: int  # of one position, in and out, at the stage where that is most


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The Head of one pipeline. Limits as in PipelineConfig."""

    plan: GroupPlan  # for a Supervisor that was restarted, and finds all by it
    epoch: int
    config_digest: str  # of the configuration it was made for
    manifest: Cid
    n_stages: int
    context_length: int
    vocab_size: int
    n_pages: int
    page_size: int
    max_step_tokens: int
    max_requests: int
    take_turns: bool  # all stages compute on the same cores
    max_waiting: int
    prefix_cache: bool
    speculate: int
    certificates: tuple[Envelope, ...]
    registry: Envelope
    state_dir: Path
    session_lifetime_s: int
    audit: AuditPlan | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a part of a pipeline cannot go on, as one of its actors sees it."""

    why: str
    gone: frozenset[str]  # parties whose process ended or is stopped, as far as the kernel of their host says
    fatal: bool = False  # what was under way is lost: the pipeline must be built anew


def group_name(group: int) -> str:
    """The name of a pipeline's placement group; its actors' names begin with it."""
    return f"llmd-{group}"


def actor_name(group: int, what: str, epoch: int) -> str:
    """The name of an actor that was made in this epoch: "head", "stage-1", "spare-0"."""
    return f"{group_name(group)}-{what}-{epoch}"


def group_of(name: str) -> int | None:
    """The pipeline that an actor or placement group of this name belongs to."""
    parts = name.split("-")
    return int(parts[1]) if parts[0] == "llmd" and len(parts) > 1 and parts[1].isdigit() else None
