"""Steps that every fused engine must compute as the plain one does, and plans that each must refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serve_app.messages.step import CLOSE, DRAWN_LAST, OPEN, SPAN, StepPlan
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

PAGE = 4
Span = tuple[int, int, int, list[int], int]  # seq, start, count, new pages, sample


def plan_of(
    spans: list[Span],
    opens: dict[int, tuple[int, int, int]] | None = None,
    closes: tuple[int, ...] = (),
    cached: tuple[int, ...] = (),
) -> StepPlan:
    """opens: seq -> temperature_micro, top_k, top_p_micro. cached: rows that each finds in its first pages."""
    opening = np.zeros(len(opens or {}), OPEN)
    for i, (seq, (temperature, top_k, top_p)) in enumerate((opens or {}).items()):
        opening["seq"][i], opening["request"][i], opening["key"][i] = seq, 7, [seq, 1, 2, 3, 4, 5, 6, 7]
        opening["temperature_micro"][i], opening["top_k"][i], opening["top_p_micro"][i] = temperature, top_k, top_p
    opening["cached"] = cached or 0
    return StepPlan(
        1,
        0,
        opening,
        np.array([(seq, start, count, len(new), sample) for seq, start, count, new, sample in spans], SPAN),
        np.array([page for span in spans for page in span[3]], "<u4"),
        np.array([(seq, 0, 0) for seq in closes], CLOSE),
        np.zeros(0, "<u8"),
    )


def ids(*values: int) -> memoryview:
    return memoryview(np.array(values, "<u4").tobytes())


def published(folder: Path, family: str) -> tuple[MemoryStore, Manifest]:
    store = MemoryStore()
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", family, layers=2, vocab=130)
    return store, split(open_checkpoint(checkpoint), store, "tiny", "float32")


STEPS: list[tuple[StepPlan, memoryview]] = [
    # Two prompts, one of them in two chunks; greedy, and with every way to draw.
    (
        plan_of([(1, 0, 5, [3, 9], 1), (2, 0, 9, [0, 1, 2], 0)], {1: (0, 0, 10**6), 2: (800_000, 20, 900_000)}),
        ids(*range(5, 10), *range(20, 29)),
    ),
    # A decode row, then the rest of a prompt, then a third sequence of one row.
    (
        plan_of([(1, 5, 1, [], 1), (2, 9, 2, [], 1), (3, 0, 1, [5], 1)], {3: (1_000_000, 0, 10**6)}),
        ids(11, 30, 31, 7),
    ),
    # Decode rows only, of tokens that the Head does not know yet; one begins a page.
    (plan_of([(3, 1, 1, [], 1), (1, 6, 1, [], 1), (2, 11, 1, [], 1)]), ids(*[DRAWN_LAST] * 3)),
    (plan_of([(1, 7, 1, [], 1), (2, 12, 1, [6], 1)], closes=(3,)), ids(DRAWN_LAST, 90)),
    (plan_of([(1, 8, 1, [11], 1)], closes=(2,)), ids(DRAWN_LAST)),
    (plan_of([], closes=(1,)), ids()),
    (plan_of([(4, 0, 3, [3], 1)], {4: (0, 0, 10**6)}), ids(1, 2, 3)),
    # Two that begin as the second did, behind one page and behind two of what it left; then both go on.
    (
        plan_of([(5, 4, 1, [0, 8], 1), (6, 8, 3, [0, 1, 7], 1)], dict.fromkeys((5, 6), (0, 0, 10**6)), cached=(4, 8)),
        ids(24, 28, 40, 41),
    ),
    (plan_of([(5, 5, 1, [], 1), (6, 11, 1, [], 1)]), ids(DRAWN_LAST, DRAWN_LAST)),
]

REFUSED: list[tuple[StepPlan, memoryview, str]] = [
    (plan_of([(1, 0, 1, [0], 1)]), ids(5), "sequence 1 is not open"),
    (plan_of([(7, 0, 2, [1], 1)]), ids(5, 6), "goes on at another position"),
    (plan_of([(7, 3, 2, [], 1)]), ids(5, 6), "too few pages"),
    (plan_of([(7, 3, 1, [40], 1)]), ids(5), "page 40 of 40"),
    (plan_of([(7, 3, 1, [], 1)]), ids(130), "token id 130 in a vocabulary of 130"),
    (plan_of([(7, 3, 1, [], 1), (7, 4, 1, [1], 1)]), ids(1, 2), "runs one sequence twice"),
    (plan_of([(7, 3, 1, [], 1)], {7: (0, 0, 10**6)}), ids(5), "is open already"),
    (plan_of([(8, 0, 1, [1], 1)], {8: (0, 0, 10**6)}), ids(DRAWN_LAST), "has drawn none"),
    (plan_of([(7, 3, 1, [], 1)]), ids(1, 2), "8 bytes for 1 rows"),
    (plan_of([(8, 0, 1, [1], 1)], {seq: (0, 0, 10**6) for seq in range(8, 40)}), ids(5), "there is room for"),
    (plan_of([(7, 3, 600, list(range(2, 39)) * 5, 1)]), memoryview(bytes(2400)), "grows beyond 512"),
]
