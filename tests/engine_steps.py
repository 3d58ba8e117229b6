"""Steps for any engine: plans written by hand over pages of four positions, and a tiny model published in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serve_app.messages.step import CLOSE, DRAWN_LAST, OPEN, SPAN, StepPlan
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.quantised import Scheme
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

PAGE, N_PAGES, MAX_SEQUENCES, VOCAB = 4, 40, 3, 130
GREEDY = (0, 0, 10**6)  # temperature_micro, top_k, top_p_micro
Span = tuple[int, int, int, list[int], int]  # seq, start, count, new pages, sample
Step = tuple[StepPlan, memoryview]


def published(
    folder: Path, family: str = "llama", scheme: Scheme | None = None, tied: bool = False
) -> tuple[MemoryStore, Manifest]:
    """Two layers of random float32 weights, or of integers made of them."""
    store = MemoryStore()
    vocab = VOCAB if scheme is None else -(-VOCAB // 16) * 16  # or embedding and head would stay floats
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", family, layers=2, vocab=vocab, tied=tied)
    return store, split(open_checkpoint(checkpoint), store, "tiny", "float32", scheme=scheme)


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


STEPS: list[Step] = [
    # Two prompts, one of them in two chunks; greedy, and with every way to draw.
    (
        plan_of([(1, 0, 5, [3, 9], 1), (2, 0, 9, [0, 1, 2], 0)], {1: GREEDY, 2: (800_000, 20, 900_000)}),
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
    (plan_of([(4, 0, 3, [3], 1)], {4: GREEDY}), ids(1, 2, 3)),
    # Two that begin as the second did, behind one page and behind two of what it left; then both go on.
    (
        plan_of([(5, 4, 1, [0, 8], 1), (6, 8, 3, [0, 1, 7], 1)], {5: GREEDY, 6: GREEDY}, cached=(4, 8)),
        ids(24, 28, 40, 41),
    ),
    (plan_of([(5, 5, 1, [], 1), (6, 11, 1, [], 1)]), ids(DRAWN_LAST, DRAWN_LAST)),
]

OPEN_SEVEN: Step = (plan_of([(7, 0, 3, [0], 1)], {7: GREEDY}), ids(1, 2, 3))
# What no engine may take once OPEN_SEVEN has run, and what is wrong with it.
REFUSED: dict[str, Step] = {
    "not open": (plan_of([(1, 0, 1, [0], 1)]), ids(5)),
    "another position": (plan_of([(7, 0, 2, [1], 1)]), ids(5, 6)),
    "too few pages": (plan_of([(7, 3, 2, [], 1)]), ids(5, 6)),
    "no such page": (plan_of([(7, 3, 1, [N_PAGES], 1)]), ids(5)),
    "no such token": (plan_of([(7, 3, 1, [], 1)]), ids(VOCAB)),
    "twice": (plan_of([(7, 3, 1, [], 1), (7, 4, 1, [1], 1)]), ids(1, 2)),
    "open already": (plan_of([(7, 3, 1, [], 1)], {7: GREEDY}), ids(5)),
    "has drawn none": (plan_of([(8, 0, 1, [1], 1)], {8: GREEDY}), ids(DRAWN_LAST)),
    "too many bytes": (plan_of([(7, 3, 1, [], 1)]), ids(1, 2)),
    "behind half a page": (plan_of([(8, 3, 1, [0], 1)], {8: GREEDY}, cached=(3,)), ids(5)),
    "behind rows, and runs none": (plan_of([(7, 3, 1, [], 1)], {8: GREEDY}, cached=(4,)), ids(5)),
    "before the rows it is behind": (plan_of([(8, 0, 1, [0], 1)], {8: GREEDY}, cached=(4,)), ids(5)),
    "beyond them": (plan_of([(8, 5, 1, [0, 1], 1)], {8: GREEDY}, cached=(4,)), ids(5)),
    "behind rows without a page for its own": (plan_of([(8, 4, 1, [0], 1)], {8: GREEDY}, cached=(4,)), ids(5)),
    "behind rows of no such page": (plan_of([(8, 4, 1, [N_PAGES, 1], 1)], {8: GREEDY}, cached=(4,)), ids(5)),
}


def numpy_is_even() -> bool:
    """Whether a row's product has the same bits wherever in a matrix it stands: on some hosts it has not.

    Triton's interpreter, which runs the GPU's kernels where there is none, multiplies by numpy.
    """
    rows = np.random.default_rng(0).standard_normal((64, 100)).astype("<f4")
    weight = np.ascontiguousarray(rows.T)
    return np.array_equal(np.roll(np.roll(rows, 3, axis=0) @ weight, -3, axis=0), rows @ weight)
