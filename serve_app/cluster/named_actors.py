"""Living actors by their names, and what their errors say."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.cluster.specs import NAMESPACE


def find_actor(name: str) -> Any | None:
    """The living actor of this name."""
    try:
        return ray.get_actor(name, NAMESPACE)
    except (ValueError, RayError):
        return None


def kill_actor(actor: Any | None) -> None:
    """Ray ends it, if it is not gone already."""
    if actor is not None and ray.is_initialized():  # else Ray would start a cluster of its own, to kill nothing in it
        with suppress(ValueError, RayError):
            ray.kill(actor)


def cause_of(error: BaseException) -> str:
    """The last line of an error in an actor: Ray's message holds the whole remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
