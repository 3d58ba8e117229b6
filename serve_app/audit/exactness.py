"""Whether an answer of a pipeline can be held to its very bits: by what its stages and its auditor say they compute by.

What they say is not trusted for more than whether to promise: a stage that computes otherwise than it says is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve_app.errors import OverloadedError, RequestError
from shard_tools.canonical import Value

PROFILE = "exact_profile"  # in what an auditor says of itself
_RETRY_S = 5
_LEVEL = "llmd.assurance"


@dataclass(frozen=True, slots=True)
class Exactness:
    """never: why no such promise is given here; now: why not yet. Both None: it is."""

    never: str | None
    now: str | None = None

    def require(self) -> None:
        """Raises RequestError, OverloadedError."""
        if self.never is not None:
            raise RequestError(f"This pipeline gives no exact answers: {self.never}. Ask for `audited`.", _LEVEL)
        if self.now is not None:
            raise OverloadedError(f"No answer can be promised to be exact now: {self.now}.", _RETRY_S)


NOT_FIXED = Exactness("what runs beside a request changes its bits (pipeline.deterministic is off, or device is cuda)")
UNKNOWN = Exactness(None, "the auditor has not said yet what it computes by")


def exactness(stages: Sequence[Value], audits: Mapping[str, Value]) -> Exactness:
    """Of a pipeline whose stages are deterministic. stages, audits: as AuditDesk.learn takes them."""
    auditor = audits.get("auditor")
    own = auditor.get(PROFILE) if isinstance(auditor, dict) else None
    if not isinstance(own, str) or not own or not stages:
        return UNKNOWN
    for stage in stages:
        said = stage.get("profile") if isinstance(stage, dict) else None
        if not isinstance(said, str):
            return Exactness(None, "a stage has not said yet what it computes by")
        if said != own:
            return Exactness(f"a stage computes by {said!r} and its auditor by {own!r}, whose bits may differ")
    return Exactness(None)
