"""The seam between a Head and whoever sees to it that answers are audited. The Head knows nothing of audits."""

from __future__ import annotations

from typing import Protocol

from serve_app.errors import RequestError
from serve_app.messages.request import GenerationRequest


class Audits(Protocol):
    """Lives in the Head's event loop."""

    def admit(self, request: GenerationRequest, *, resumed: bool) -> None:
        """Returns if the level that the request asks for can be given; what that takes is then set aside for it.

        resumed: another Head had taken it in. Raises RequestError if never, OverloadedError if not now.
        """

    def ended(self, request: GenerationRequest, receipt: bytes) -> None:
        """An admitted request is over. receipt: its bundle; empty if it has none."""


class NoAudits:
    """Of a pipeline that nobody audits."""

    def admit(self, request: GenerationRequest, *, resumed: bool) -> None:
        if request.assurance != "signed":
            raise RequestError(
                f"This pipeline gives no {request.assurance!r} answers, only signed ones: nobody audits it.",
                "llmd.assurance",
            )

    def ended(self, request: GenerationRequest, receipt: bytes) -> None:
        pass
