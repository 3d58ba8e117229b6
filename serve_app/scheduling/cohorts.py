"""Which sequences step together where several stages work at once and no token is waited for.

A step that runs the row of a token on its way waits in the first stage for the step that draws it. With two stages and
two halves of the sequences that take turns, that one has just ended when its turn comes again. Were the halves mixed,
every step would wait for the one before it, and the stages would work one at a time. So a sequence keeps its cohort,
and changes it only where the cohorts have become unequal, as sequences came and went.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from serve_app.scheduling.sequence import Sequence

_UNEQUAL = 8  # a cohort that is larger by more than this part of all gives some away: each move costs one wait


class Cohorts:
    """Takes turns among n of them."""

    def __init__(self, n: int) -> None:
        self._n, self._turn = n, 0

    def choose(self, ready: list[Sequence], running: Many[Sequence]) -> list[Sequence]:
        """Of those that may draw, the cohort whose turn it is, in the given order; the next one if it has none."""
        sizes = [0] * self._n
        for sequence in running:
            if sequence.cohort is not None:
                sizes[sequence.cohort] += 1
        for sequence in ready:
            if sequence.cohort is None:
                sequence.cohort = sizes.index(min(sizes))
                sizes[sequence.cohort] += 1
        allowed = max(1, sum(sizes) // _UNEQUAL)
        for sequence in reversed(ready):
            largest, least = max(sizes), min(sizes)
            if largest - least <= allowed:
                break
            if sequence.cohort is not None and sizes[sequence.cohort] == largest:
                sizes[sequence.cohort] -= 1
                sequence.cohort = sizes.index(least)
                sizes[sequence.cohort] += 1
        for k in range(self._n):
            now = (self._turn + k) % self._n
            chosen = [sequence for sequence in ready if sequence.cohort == now]
            if chosen:
                self._turn = (now + 1) % self._n
                return chosen
        return []
