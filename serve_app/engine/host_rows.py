"""An engine whose rows all pass through the host, whatever it could do besides; under its own name or another's."""

from __future__ import annotations

from serve_app.engine.engine import Engine, EngineProfile, Launched
from serve_app.messages.step import StepPlan


class HostRows:
    """Implements engine.Engine by another engine, which is not asked to hash: so its rows are there to be kept."""

    def __init__(self, engine: Engine, profile: EngineProfile | None = None) -> None:
        """profile: what it says it is, if not what it is: of a stage that cheats."""
        self._engine, self._profile = engine, profile or engine.profile

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    def reserve(self, n_pages: int, max_sequences: int) -> None:
        self._engine.reserve(n_pages, max_sequences)

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False

    def launch(self, plan: StepPlan, rows: memoryview) -> Launched:
        return self._engine.launch(plan, rows)
