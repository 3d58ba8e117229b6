"""What the processes that audit are told: out of the configuration, and out of what a pipeline is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.audit.desk import Terms
from serve_app.cluster.specs import AuditPlan, HeadSpec
from serve_app.config import AppConfig, AuditConfig
from serve_app.engine.engine import ActivationDtype
from serve_app.receipts.identity import Certificate
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.manifest import Manifest
from shard_tools.signing import PublicKey
from shard_tools.trust import TrustPolicy

AUDITOR = "llmd-auditor"  # the actor's name
FOLDER = "audit"  # under state_dir
OWNER = "operator"  # whose auditor it is: the one who also runs the stages, so that its word never quarantines alone
_MICRO = 10**6


@dataclass(frozen=True, slots=True)
class ExactSpec:
    """How the stages compute, where their bits depend on nothing else."""

    dtype: ActivationDtype
    threads: int


@dataclass(frozen=True, slots=True)
class AuditorSpec:
    """What an auditor audits, and by what."""

    manifest: Cid
    signature: Cid
    trusted: TrustPolicy
    store: Path | Choice
    calibrations: tuple[Cid, ...]
    bands: tuple[Cid, ...]  # of draws
    threads: int
    state_dir: Path
    operator: PublicKey  # signs the registry that receipts rest on
    exact: ExactSpec | None  # None: bits of its stages cannot be repeated
    version: str  # of the application, all of whose pipelines are audited
    number: int  # of a pipeline: two versions may be there for a while, and the younger one is audited

    def is_like(self, other: AuditorSpec) -> bool:
        """Whether the same auditor does for both."""
        return replace(self, number=0) == replace(other, number=0)


def audit_plan(config: AuditConfig, manifest: Manifest, dtype: ActivationDtype) -> AuditPlan | None:
    """How this pipeline is audited; None if it is not."""
    if not config.on:
        return None
    row_bytes = 2 * manifest.hidden_size * (4 if dtype == "float32" else 2)
    return AuditPlan(round(config.rate * _MICRO), config.on_request, config.retain_bytes, row_bytes)


def auditor_spec(config: AppConfig, spec: HeadSpec) -> AuditorSpec:
    """The auditor of this pipeline, and of all others of its version."""
    stage = spec.plan.stages[0]
    return AuditorSpec(
        manifest=spec.manifest,
        signature=stage.signature,
        trusted=stage.trusted,
        store=stage.store,
        calibrations=tuple(Cid.parse(text) for text in config.audit.calibration),
        bands=tuple(Cid.parse(text) for text in config.audit.band),
        threads=config.audit.threads,
        state_dir=spec.state_dir,
        operator=spec.registry.key,
        exact=ExactSpec(spec.plan.dtype, spec.plan.wants.threads) if _fixed(spec) else None,
        version=spec.plan.group.version,
        number=spec.plan.group.number,
    )


def terms_of(spec: HeadSpec, plan: AuditPlan) -> Terms:
    """What a Head may promise."""
    return Terms(
        rate_micro=plan.rate_micro,
        n_stages=spec.n_stages,
        page_size=spec.page_size,
        row_bytes=plan.row_bytes,
        retain_bytes=plan.retain_bytes,
        busy_bytes=spec.n_pages * spec.page_size * plan.row_bytes,
        on_request=plan.on_request,
        fixed=_fixed(spec),
    )


def nodes_of(spec: HeadSpec) -> list[PublicKey]:
    """The node of each stage."""
    return [Certificate.decode(envelope.payload).node for envelope in spec.certificates]


def _fixed(spec: HeadSpec) -> bool:
    """Whether stages compute in windows of one shape, on what the auditor has too."""
    return all(stage.deterministic and stage.device == "cpu" for stage in spec.plan.stages)
