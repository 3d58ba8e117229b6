"""Whether a process grows: its memory, threads and open files, looked at again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.spread import percentile, slope

MAX_POINTS = 40  # of the course
WARM_UP = 0.3  # of the run: caches fill, allocators take what they will keep
MEMORY_ROOM = 0.04  # growth over the rest that is still noise, of what was held ...
MEMORY_ROOM_BYTES = 12 << 20  # ... or this much: an allocator's arenas come in such pieces
COUNT_ROOM = 4  # threads or files: a pool's last worker, a socket that is being closed


class ProcessWatch:
    """Samples of this process, or those given: seconds, bytes of memory, threads, open files."""

    def __init__(self, samples: Sequence[tuple[float, int, int, int]] = ()) -> None:
        self._samples = list(samples)

    def look(self) -> None:
        """Take a sample."""
        tasks, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        self._samples.append((time.monotonic(), resident_bytes(), tasks, files))

    def figures(self) -> dict[str, Any]:
        """What there is, how much memory grew after the warm-up, and its course in a few points."""
        warm = self._warm()
        if not warm:
            return {}
        seconds, memory, threads, files = (list(column) for column in zip(*warm, strict=True))
        every, began = -(-len(self._samples) // MAX_POINTS), self._samples[0][0]
        return {
            "memory_mb": round(memory[-1] / 1e6, 1),
            "memory_growth_mb": round(slope(seconds, memory) * (seconds[-1] - seconds[0]) / 1e6, 1),
            "threads": threads[-1],
            "open_files": files[-1],
            "memory_mb_by_s": [[round(s - began, 1), round(m / 1e6, 1)] for s, m, _, _ in self._samples[::every]],
        }

    def problems(self) -> list[str]:
        """What grew, in words."""
        warm = self._warm()
        if len(warm) < 6:
            return ["the run was too short to see whether the process grows"]
        seconds, memory, threads, files = (list(column) for column in zip(*warm, strict=True))
        found = []
        grown = slope(seconds, memory) * (seconds[-1] - seconds[0])
        if grown > max(MEMORY_ROOM_BYTES, MEMORY_ROOM * memory[0]):
            found.append(f"memory grew by {grown / 1e6:.1f} MB in {seconds[-1] - seconds[0]:.0f} s after the warm-up")
        third = len(warm) // 3
        for name, counts in (("threads", threads), ("open files", files)):
            early, late = percentile(counts[:third], 50), percentile(counts[-third:], 50)
            if late > early + COUNT_ROOM:
                found.append(f"{name} grew from {early:.0f} to {late:.0f}")
        return found

    def _warm(self) -> list[tuple[float, int, int, int]]:
        if not self._samples:
            return []
        first, last = self._samples[0][0], self._samples[-1][0]
        return [sample for sample in self._samples if sample[0] >= first + WARM_UP * (last - first)]


def resident_bytes() -> int:
    """Memory of this process that is in RAM and no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
