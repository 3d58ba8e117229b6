"""What the Supervisor tells the actors it makes: plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.cluster.wiring import Party
from serve_app.engine.engine import DeviceName, EngineProfile, KvDtype
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.signing import Envelope
from shard_tools.trust import TrustPolicy

NAMESPACE = "llmd"
SUPERVISOR = "llmd-supervisor"


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of one pipeline."""

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

    @property
    def name(self) -> str:
        """The actor's name in NAMESPACE."""
        return stage_name(self.epoch, self.stage)


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
class HeadSpec:
    """The Head of one pipeline. Limits as in PipelineConfig."""

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

    @property
    def name(self) -> str:
        """The actor's name in NAMESPACE."""
        return head_name(self.epoch)


def head_name(epoch: int) -> str:
    """The name of a pipeline's Head."""
    return f"llmd-{epoch}-head"


def stage_name(epoch: int, stage: int) -> str:
    """The name of one of a pipeline's stages."""
    return f"llmd-{epoch}-stage-{stage}"
