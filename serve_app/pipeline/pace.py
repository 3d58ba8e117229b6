"""Tells a stage that has become slow from a load that has: by its own earlier pace, beside that of the other stages.

A stage that answers and computes may crawl all the same: a GPU that is throttled, a neighbour that takes its cores, a
host that swaps. All stages compute the same steps, so what makes steps dearer (more rows, a longer context, a machine
with much to do) slows all of them; who slows alone is ill. Knows no clock: what is compared is time spent in steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shard_tools.canonical import Value

TIMES = 4.0  # slower than its own pace, and than the others have become: contexts cost all of them up to ten times
_BLOCK = 16  # steps of one size, whose median is a pace that was kept for a while, not one lucky step
_WINDOW_MS = 3000  # of the busiest stage, and so many steps at least, are judged as one
_WINDOW_STEPS = 16
_TOLD_MS = 9000  # three windows in a row
_BETTER = 0.5  # of TIMES: what is told is taken back below it, or it would come and go
_AGAIN_MS = 600_000  # of steps between two replacements: what a spare does not mend, the next one will not


class Pace:
    """Of one stage's steps in one epoch; one thread tells, any may read.

    A new epoch begins to learn anew, in all stages from the same step on: so they are compared by the same steps.
    """

    def __init__(self) -> None:
        self.steps = 0  # whose usual time is known
        self.took_s = 0.0  # they
        self.usual_s = 0.0  # and what they would have at the best pace that was kept for a while
        self._usual: dict[tuple[int, int], float] = {}  # bit lengths of rows and of draws -> seconds
        self._lately: dict[tuple[int, int], list[float]] = {}

    def took(self, rows: int, draws: int, seconds: float) -> None:
        """A step has ended. draws: how many tokens were drawn of it; the last stage has work for each of them."""
        size = rows.bit_length(), draws.bit_length()
        usual = self._usual.get(size)
        if usual is not None:
            self.steps += 1
            self.took_s += seconds
            self.usual_s += usual
        lately = self._lately.setdefault(size, [])
        lately.append(seconds)
        if len(lately) == _BLOCK:
            kept = statistics.median(lately)
            self._usual[size] = kept if usual is None else min(kept, usual)
            lately.clear()

    def to_value(self) -> dict[str, Value]:
        """As Crawling reads it."""
        return {"steps": self.steps, "took_us": int(self.took_s * 1e6), "usual_us": int(self.usual_s * 1e6)}


@dataclass(frozen=True, slots=True)
class _Spent:
    """What a stage has done so far, or between two looks."""

    steps: int
    took_us: int
    usual_us: int
    layers: int

    @property
    def times(self) -> float:
        """Slower than its own pace."""
        return self.took_us / max(1, self.usual_us)

    def since(self, before: _Spent) -> _Spent:
        return _Spent(
            self.steps - before.steps, self.took_us - before.took_us, self.usual_us - before.usual_us, self.layers
        )


@dataclass(slots=True)
class _Slow:
    """A stage that has been slow alone in each of the last windows."""

    for_ms: float
    why: str = ""


class Crawling:
    """Which stages of one pipeline crawl; told by each look what they said of themselves."""

    def __init__(self) -> None:
        self._began: dict[int, _Spent] = {}  # when the window did
        self._epoch = -1
        self._slow: dict[int, _Slow] = {}
        self._seen_ms = 0.0  # of the busiest stage, in all windows
        self._replaced_ms = -float(_AGAIN_MS)

    def look(self, stages: Sequence[Value], epoch: int) -> list[str]:
        """See what each stage of this epoch says, and write into it whether it crawls. Returns what is new of that.

        A stage of another operator may say anything, and is then not judged.
        """
        before = self.told()
        self._see(stages, epoch)
        told = self.told()
        for facts in stages:
            if isinstance(facts, dict) and isinstance(stage := facts.get("stage"), int):
                facts["crawls"] = told.get(stage)
        news = [f"stage {stage} crawls: {why}" for stage, why in told.items() if stage not in before]
        return news + [f"stage {stage} crawls no longer" for stage in before if stage not in told]

    def told(self) -> dict[int, str]:
        """Stages that crawl for a while now, and by how much."""
        return {stage: slow.why for stage, slow in self._slow.items() if slow.for_ms >= _TOLD_MS}

    def to_replace(self, after_s: float) -> tuple[int, str] | None:
        """The first stage that has spent so long in steps at a crawl, if none was said to be replaced lately."""
        if self._seen_ms - self._replaced_ms < _AGAIN_MS:
            return None
        found = min((stage for stage, slow in self._slow.items() if slow.for_ms >= after_s * 1000), default=None)
        if found is None:
            return None
        self._replaced_ms = self._seen_ms
        return found, f"stage {found} crawls: {self._slow[found].why}"

    def _see(self, stages: Sequence[Value], epoch: int) -> None:
        now = {stage: spent for facts in stages if (said := _read(facts)) is not None for stage, spent in [said]}
        if epoch != self._epoch or now.keys() != self._began.keys():
            self._epoch, self._began, self._slow = epoch, now, {}
            return
        spent = {stage: now[stage].since(before) for stage, before in self._began.items()}
        if any(min(s.steps, s.took_us, s.usual_us) < 0 for s in spent.values()):
            self._began, self._slow = now, {}
            return
        busiest_ms = max((s.took_us for s in spent.values()), default=0) / 1000
        if busiest_ms < _WINDOW_MS or min(s.steps for s in spent.values()) < _WINDOW_STEPS:
            return
        self._began = now
        self._seen_ms += busiest_ms
        self._judge(spent)

    def _judge(self, spent: Mapping[int, _Spent]) -> None:
        for stage, own in spent.items():
            others = [s for other, s in spent.items() if other != stage]
            if not others:
                continue
            # Of two others the better one: where rows are lent on, those behind a slow stage wait within their steps.
            load = statistics.median_low(s.times for s in others)
            alone, slow = min(own.times, own.times / max(1.0, load)), self._slow.get(stage)
            if alone < TIMES:
                if slow is not None and (slow.for_ms < _TOLD_MS or alone < TIMES * _BETTER):
                    del self._slow[stage]
                continue
            if slow is None:
                slow = self._slow[stage] = _Slow(0.0)
            slow.for_ms += min(own.took_us / 1000, _WINDOW_MS)  # one step of a minute is no crawl
            share = own.took_us / own.layers / max(1.0, statistics.median_low(s.took_us / s.layers for s in others))
            slow.why = (
                f"{own.times:.1f} times slower than its own pace, the others {load:.1f}; "
                f"{share:.1f} times its share by its layers"
            )


def _read(facts: Value) -> tuple[int, _Spent] | None:
    """What a stage says of its pace, if it does so in an order that can be compared."""
    if not isinstance(facts, dict):
        return None
    stage, pace, layers = facts.get("stage"), facts.get("pace"), facts.get("layers")
    if not isinstance(stage, int) or not isinstance(pace, dict) or not isinstance(layers, list) or len(layers) != 2:
        return None
    counts = [pace.get(name) for name in ("steps", "took_us", "usual_us")]
    start, stop = layers
    if not isinstance(start, int) or not isinstance(stop, int) or not 0 <= start < stop:
        return None
    steps, took_us, usual_us = counts
    if not (isinstance(steps, int) and isinstance(took_us, int) and isinstance(usual_us, int)):
        return None
    return stage, _Spent(steps, took_us, usual_us, stop - start)
