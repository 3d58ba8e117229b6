"""What a pipeline's status says of pages, rows and cached prefixes, read so that other builds may say more or less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value


def counter(pipeline: Mapping[str, Any], *words: str) -> int | None:
    """The sum of the pipeline's own counters, not its stages', whose name holds every word; None if there is none."""
    own = {key: value for key, value in pipeline.items() if key != "stages"}
    found = [number for name, number in _numbers(own) if all(word in name.lower() for word in words)]
    return sum(found) if found else None


def prefix_hits(pipeline: Mapping[str, Any]) -> int | None:
    """Prompt tokens that the build says it found in its prefix cache; None where it has no such cache."""
    found = counter(pipeline, "cached_tokens")
    return counter(pipeline, "hit") if found is None else found


def preemptions(pipeline: Mapping[str, Any]) -> int:
    """How often a running request lost its pages; 0 where that cannot happen."""
    return counter(pipeline, "preempt") or 0


def free_pages(pipeline: Mapping[str, Any], n_pages: int) -> int:
    """Pages that a new request could have: free ones, and those that are only kept in case they are asked for again."""
    free = int(pipeline["free_pages"])
    return free if free == n_pages else free + (counter(pipeline, "cached", "pages") or 0)


def rows_problem(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    hashed: Sequence[int],
    receipts_rows: int,
    *,
    reused: Sequence[int] | None = None,
    cancelled_rows: int = 0,
) -> str | None:
    """Why the rows of a run do not add up, or None.

    before, after: the pipeline's status. hashed: rows each stage hashed in the run; reused: those whose hashes it had
    already, None if it does not say. receipts_rows: rows that the receipts speak of. cancelled_rows: at most so many
    more are of requests that ended without one. Rows of an attempt that was preempted run, and count as abandoned.
    """
    run = int(after["rows_run"]) - int(before["rows_run"])
    abandoned = (counter(after, "rows_abandoned") or 0) - (counter(before, "rows_abandoned") or 0)
    cached = (prefix_hits(after) or 0) - (prefix_hits(before) or 0)
    if len(set(hashed)) != 1 or (reused is not None and len(set(reused)) != 1):
        return f"the stages hashed different numbers of rows: {list(hashed)}, and reused {reused}"
    known = hashed[0] + (reused[0] if reused is not None else 0)
    spared = cached if reused is None else 0
    if not receipts_rows - spared <= known <= receipts_rows + cancelled_rows:
        more = f" and up to {cancelled_rows} of cancelled requests" if cancelled_rows else ""
        return f"{known} rows were hashed, the receipts speak of {receipts_rows}{more}"
    # One stage alone looks ahead and runs rows that turn out void; without that every row that runs counts.
    exact = len(hashed) > 1 and not cancelled_rows
    if run < hashed[0] or (exact and run != hashed[0] + abandoned):
        return f"{run} rows were run, {hashed[0]} hashed and {abandoned} abandoned"
    return None
