"""Carries what a Head's desk has for the auditor to it, and back what the auditor says. Serving never waits for it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from serve_app.audit.desk import MAX_BATCH, AuditDesk, Drawn
from serve_app.cluster.audit_specs import AUDITOR
from serve_app.cluster.named_actors import cause_of, find_actor
from serve_app.cluster.specs import HeadSpec, Outsider
from serve_app.errors import PipelineError

_log = logging.getLogger(__name__)
_EVERY_S = 0.5  # an idle auditor is asked so often whether it lives
_CALL_S = 10.0  # a log on a slow disk, on a loaded machine
_MAX_DRAWN = 4096  # that wait for an auditor that went away just then


class AuditPump:
    """Of one Head."""

    def __init__(self, desk: AuditDesk, spec: Callable[[], HeadSpec]) -> None:
        """spec: what the Head leads now; where its stages are, an auditor must know."""
        self._desk, self._spec = desk, spec
        self._name = uuid.uuid4().hex  # among the desks of all pipelines
        self._auditor: Any | None = None
        self._drawn: list[tuple[Drawn, tuple[str | Outsider, ...]]] = []  # with the names of the stages' actors

    async def run(self) -> None:
        """Never ends."""
        while True:
            sent = 0
            try:
                sent = await self._turn()
            except (RayError, TimeoutError, PipelineError) as e:
                self._auditor = None
                self._desk.failed(f"the auditor does not answer: {cause_of(e)}")
            except Exception as e:  # a mistake of ours must not end all audits in silence
                _log.exception("the auditor cannot be spoken to")
                self._desk.failed(f"{type(e).__name__}: {e}")
            if sent < MAX_BATCH:
                await asyncio.sleep(_EVERY_S)

    async def _turn(self) -> int:
        if self._auditor is None:
            self._auditor = await asyncio.get_running_loop().run_in_executor(None, find_actor, AUDITOR)
        if self._auditor is None:
            raise PipelineError("there is none")
        outgoing = self._desk.outgoing()
        async with asyncio.timeout(_CALL_S):
            root, settled = await self._auditor.note.remote(outgoing, self._name)
        stages = tuple(place.outside or place.actor for place in self._spec().plan.places)
        self._drawn += [(one, stages) for one in self._desk.said(outgoing, root, settled)]
        del self._drawn[:-_MAX_DRAWN]
        if self._drawn:
            drawn = list(self._drawn)
            async with asyncio.timeout(_CALL_S):
                await self._auditor.audit.remote(drawn)
            del self._drawn[: len(drawn)]
        return len(outgoing.notes)
