"""What the Supervisor tells the actors it makes: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.cluster.wiring import Party
from serve_app.engine.engine import ActivationDtype, DeviceName, EngineProfile, KvDtype
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.signing import Envelope, PublicKey
from shard_tools.trust import TrustPolicy

NAMESPACE = "llmd"
GPU_KV_SHARE = 0.85  # of the memory that is free once the weights are loaded; the rest is for activations
_SUPERVISOR = "llmd-supervisor-"


@dataclass(frozen=True, slots=True, order=True)
class GroupId:
    """One pipeline of one version of the application; its placement group and actors have their names from it."""

    version: str  # as version.version_of
    replica: int  # which of its pipelines
    number: int  # of those that were this one, later ones are larger

    def __str__(self) -> str:
        return f"llmd-{self.version}-{self.replica}-{self.number}"

    def actor(self, what: str, epoch: int) -> str:
        """The name of an actor that was made in this epoch: "head", "stage-1", "spare-0"."""
        return f"{self}-{what}-{epoch}"

    @classmethod
    def of(cls, name: str) -> GroupId | None:
        """The pipeline that an actor or placement group of this name belongs to."""
        parts = name.split("-")
        ours = parts[0] == "llmd" and len(parts) > 3 and parts[2].isdigit() and parts[3].isdigit()
        return cls(parts[1], int(parts[2]), int(parts[3])) if ours and not is_supervisor(name) else None


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
    max_pages: int | None = None  # of KV, that it has room for; None: as the configuration says


@dataclass(frozen=True, slots=True)
class Resources:
    """What each stage asks Ray for."""

    device: DeviceName
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, slots=True)
class Outsider:
    """A stage that another operator runs, as the configuration names it."""

    host: str
    port: int
    key: PublicKey  # of its node
    grace_s: int  # so long it is waited for when it cannot be reached
    stand_in: bool  # whether the cluster has room for a process of its own in its place


@dataclass(frozen=True, slots=True)
class Place:
    """An actor, and the bundle of the placement group that it lives in."""

    actor: str  # its name; "" if it is none
    bundle: int  # of an outside stage: where its stand-in would live
    pid: int = 0  # once that is known
    ray_node: str = ""
    prepared_for: int = -1  # of a spare: the stage whose layers it holds
    outside: Outsider | None = None  # who it is instead of an actor


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Which actors are a pipeline, and what each is to be."""

    group: GroupId
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


def supervisor_name(version: str) -> str:
    """The name of the actor that makes and watches the pipelines of this version."""
    return f"{_SUPERVISOR}{version}"


def is_supervisor(name: str) -> bool:
    """Whether an actor of this name is the Supervisor of some version."""
    return name.startswith(_SUPERVISOR)
