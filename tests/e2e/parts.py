"""The processes of a running application by what they do, found as any user can: through Ray's state API.

Knows the names under which the application's actors are listed, and nothing of what is behind them.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

Kind = Literal["stage", "head", "supervisor", "ingress"]

_DASHBOARD = re.compile(r"dashboard at \D*?(http://[\w.]+:\d+)")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_INGRESS = "ServeReplica:llmd:ingress"


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the application. index: of a stage, else 0; node: Ray's id of where it runs.

    replica: of which of several pipelines it is, if of one.
    """

    kind: Kind
    index: int
    pid: int
    node: str
    replica: int = 0

    def __str__(self) -> str:
        return f"stage {self.index}" if self.kind == "stage" else self.kind

    def hear(self, what: signal.Signals) -> bool:
        """Sends it a signal; False if it had ended before."""
        try:
            os.kill(self.pid, what)
        except ProcessLookupError:
            return False
        return True


class Parts:
    """Asks one Ray's dashboard."""

    def __init__(self, dashboard: str, token_file: Path, application: str) -> None:
        """application: its URL; it says which spare has become which stage."""
        self._application = application
        # Those that died stay listed, and would fill the limit in time.
        self._url = f"{dashboard}/api/v0/actors?limit=1000&filter_keys=state&filter_predicates==&filter_values=ALIVE"
        self._headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}

    def alive(self, timeout_s: float = 10.0) -> list[Part]:
        """Every part that Ray says is alive, stages in order. Raises LookupError if it does not say."""
        try:
            answer = httpx.get(self._url, headers=self._headers, timeout=timeout_s).json()
            actors = answer["data"]["result"]["result"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
            raise LookupError(f"Ray's state API does not answer: {type(e).__name__}: {e}") from e
        roles = self._roles(timeout_s)
        parts = [_part(actor, roles) for actor in actors if actor["state"] == "ALIVE" and actor["pid"]]
        return sorted((part for part in parts if part), key=lambda part: (part.kind, part.index, part.pid))

    def _roles(self, timeout_s: float) -> dict[str, int]:
        """Stages by the name of their actor, as the application knows them; none while it does not say."""
        try:
            state = httpx.get(f"{self._application}/v1/cluster/state", timeout=timeout_s).json()
            return {s["actor"]: s["stage"] for pipeline in state["pipelines"] for s in pipeline["stages"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return {}

    def one(self, kind: Kind, index: int = 0) -> Part:
        """This part. Raises LookupError if there is none."""
        found = [part for part in self.alive() if (part.kind, part.index) == (kind, index)]
        if not found:
            raise LookupError(f"no {kind} {index} is alive")
        return found[-1]  # beside one that is being replaced: the younger, as a rule


def dashboard_of(log: Path) -> str:
    """Where the dashboard of the Ray that wrote this log listens. Raises LookupError."""
    found = _DASHBOARD.search(_COLOURS.sub("", log.read_text(errors="replace")))
    if not found:
        raise LookupError(f"{log} does not say where Ray's dashboard is")
    return found[1]


def _part(actor: dict[str, Any], roles: dict[str, int]) -> Part | None:
    name, kind, index = actor["name"] or "", "", 0
    if actor["class_name"] == _INGRESS:
        kind = "ingress"
    elif actor["ray_namespace"] == "llmd" and name.startswith("llmd-"):
        stage = re.search(r"stage-(\d+)", name)
        kind = "stage" if stage else "head" if "head" in name else "supervisor" if "supervisor" in name else ""
        index = int(stage[1]) if stage else 0
        if name in roles:
            kind, index = "stage", roles[name]
    pipeline = re.match(r"llmd-[0-9a-f]+-(\d+)-", name)
    replica = int(pipeline[1]) if pipeline else 0
    return Part(kind, index, actor["pid"], actor["node_id"], replica) if kind else None  # type: ignore[arg-type]
