"""How long work says how far it is; a terminal draws it, a log prints it, a test counts it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from the thread that started the work, in order, `done` never falling."""

    def __call__(self, label: str, done_bytes: int, total_bytes: int, /) -> None:
        """label: what is being worked on now, such as `layer 3`."""


def silent(label: str, done_bytes: int, total_bytes: int) -> None:
    """A Progress that says nothing."""
