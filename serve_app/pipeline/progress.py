"""Tells a stage that computes nothing from one that only has much to do: by how long its own steps have taken so far.

A process that answers pings may still hang: a driver that does not return, two threads that wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shard_tools.canonical import Value

# No step is overdue before. A loaded host may not let one run for so long; on a GPU a kernel may be compiled first.
FLOOR_S = 5.0
GPU_FLOOR_S = 30.0
_TIMES = 20.0  # the slowest step of its size so far: in a long context the same rows cost up to ten times as much
_FADES = 0.98  # what one slow step still says after each that is not


@dataclass(frozen=True, slots=True)
class Overdue:
    """A step that should have ended. step: the Head's number of it."""

    step: int
    waited_s: float
    limit_s: float

    def to_value(self) -> dict[str, Value]:
        """As `hanging` reads it."""
        return {"step": self.step, "waited_ms": int(self.waited_s * 1000), "limit_ms": int(self.limit_s * 1000)}


class Progress:
    """Of the steps of one engine; any thread may call."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._lock = threading.Lock()
        self._now: dict[int, tuple[int, int, float]] = {}  # thread -> step, rows, since when
        self._slowest: dict[int, float] = {}  # bit length of the number of rows -> seconds

    @contextmanager
    def computing(self, step: int, rows: int, since: float | None = None) -> Iterator[None]:
        """This thread waits for nothing but the engine meanwhile, and by the end the step has ended.

        since: when it was launched, as time.perf_counter, if it is learned from; None: nothing is.
        """
        me, began = threading.get_ident(), time.perf_counter()
        with self._lock:
            self._now[me] = step, rows, began
        try:
            yield
        finally:
            now = time.perf_counter()
            with self._lock:
                del self._now[me]
                if since is not None and rows:
                    size = rows.bit_length()
                    self._slowest[size] = max(now - since, self._slowest.get(size, 0.0) * _FADES)

    def overdue(self) -> Overdue | None:
        """The oldest step that takes far longer than any before it; None while nothing is known to compare it with."""
        now = time.perf_counter()
        with self._lock:
            for step, rows, began in sorted(self._now.values()):
                limit = self._limit(rows)
                if limit is not None and now - began > limit:
                    return Overdue(step, now - began, limit)
        return None

    def _limit(self, rows: int) -> float | None:
        """Seconds that so many rows may take. Larger steps than any so far cost in proportion to their rows."""
        size, seen = rows.bit_length(), sorted(self._slowest)
        if not seen:
            return None
        like = next((s for s in seen if s >= size), seen[-1])
        return max(self._floor_s, _TIMES * self._slowest[like] * 2.0 ** max(0, size - like))


def hanging(stages: Sequence[Value]) -> tuple[int, str] | None:
    """Which stage computes nothing, and why that is thought; from what all of them say of themselves.

    Where rows go past the hosts, who waits for a neighbour's is overdue too: the one that hangs has the oldest step,
    and of those with that step it is the first in the pipeline.
    """
    late = [
        (step, stage, waited_ms)
        for facts in stages  # a stage of another operator may say anything
        if isinstance(facts, dict)
        and isinstance(said := facts.get("overdue"), dict)
        and isinstance(stage := facts.get("stage"), int)
        and isinstance(step := said.get("step"), int)
        and isinstance(waited_ms := said.get("waited_ms"), int)
    ]
    if not late:
        return None
    step, stage, waited_ms = min(late)
    return stage, f"stage {stage} answers, but is at step {step} since {waited_ms} ms, far longer than any like it"
