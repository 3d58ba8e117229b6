"""Which stage has become slow, and what is no such thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.load import LoadOptions
from serve_app.local import LocalPipeline
from serve_app.messages.request import GenerationRequest, RequestId, Sampling, fresh_salt
from serve_app.pipeline.pace import Crawling, Pace
from shard_tools.canonical import Value
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

# Milliseconds of the decode steps of one answer of SmolLM2-135M (two stages of 15 layers in float32, on two cores that
# three other programs used), as they came; the last stage draws tokens besides.
# fmt: off
FIRST = (
    15.19, 13.87, 17.39, 45.02, 29.72, 23.45, 23.94, 25.72, 11.59, 15.31, 16.45, 11.78, 31.65, 13.73, 14.91, 15.97,
    18.41, 36.33, 15.41, 12.92, 15.55, 17.52, 9.9, 17.75, 11.75, 15.57, 23.3, 15.54, 11.5, 18.19, 14.28, 15.59, 16.49,
    16.0, 16.38, 16.02, 15.93, 15.73, 16.32, 14.33, 16.08, 16.14, 15.11, 15.71, 16.89, 15.85, 18.27, 116.6,
)
LAST = (
    20.23, 21.05, 22.32, 51.74, 48.59, 24.15, 28.63, 47.63, 60.19, 38.93, 46.63, 19.8, 27.83, 23.99, 29.89, 17.68,
    26.45, 23.74, 22.15, 23.77, 19.01, 19.17, 28.52, 19.8, 23.8, 22.89, 36.68, 125.41, 25.97, 23.38, 23.99, 22.71,
    21.42, 22.85, 22.23, 23.41, 23.5, 23.22, 23.19, 21.55, 20.67, 25.81, 22.47, 23.05, 23.49, 23.77, 23.73, 19.61,
)
# fmt: on


@dataclass
class Pipeline:
    """Stages that run the same steps, asked once a second of their own time."""

    seconds: tuple[tuple[float, ...], ...] = (FIRST, LAST)  # of each stage, in milliseconds
    epoch: int = 7
    paces: list[Pace] = field(default_factory=list)
    crawling: Crawling = field(default_factory=Crawling)
    news: list[str] = field(default_factory=list)
    ran: int = 0

    def __post_init__(self) -> None:
        self.paces = [Pace() for _ in self.seconds]

    def run(
        self,
        busy_s: float,
        slower: Iterable[float] = (),
        rows: Callable[[int], tuple[int, int, float]] = lambda i: (1, 1, 1.0),
    ) -> None:
        """For so long of the slowest stage's time. slower: each by this; rows: of step i, its draws, its cost."""
        slower = [*slower] or [1.0] * len(self.paces)
        spent = looked = 0.0
        while spent < busy_s:
            n, draws, cost = rows(self.ran)
            took = [s[self.ran % len(s)] / 1000 * cost * by for s, by in zip(self.seconds, slower, strict=True)]
            for pace, seconds in zip(self.paces, took, strict=True):
                pace.took(n, draws, seconds)
            self.ran += 1
            spent += max(took)
            if spent - looked >= 1.0:
                looked = spent
                self.look()

    def said(self) -> list[Value]:
        layers: list[Value] = [0, 15]
        return [{"stage": i, "layers": layers, "pace": pace.to_value()} for i, pace in enumerate(self.paces)]

    def look(self) -> list[Value]:
        said = self.said()
        self.news += self.crawling.look(said, self.epoch)
        return said


def marks(said: list[Value]) -> list[Value]:
    return [facts["crawls"] for facts in said if isinstance(facts, dict)]


def test_a_stage_that_slows_down_alone_is_told_of_once_and_replaced_once() -> None:
    """First by how much, in its own entry; then, when it has crawled for long, that it is to go."""
    pipeline = Pipeline()
    pipeline.run(20)
    assert pipeline.news == [] and marks(pipeline.look()) == [None, None]
    pipeline.run(22, slower=(1.0, 5.0))
    assert len(pipeline.news) == 1 and pipeline.news[0].startswith("stage 1 crawls: "), pipeline.news
    assert marks(pipeline.look())[0] is None and "the others 1." in str(marks(pipeline.look())[1])
    assert pipeline.crawling.to_replace(30) is None
    pipeline.run(30, slower=(1.0, 5.0))
    found = pipeline.crawling.to_replace(30)
    assert found is not None and found[0] == 1 and "its share by its layers" in found[1]
    pipeline.run(60, slower=(1.0, 5.0))
    assert pipeline.crawling.to_replace(30) is None and len(pipeline.news) == 1


def test_one_that_keeps_its_pace_again_is_told_of_no_longer() -> None:
    pipeline = Pipeline()
    pipeline.run(10)
    pipeline.run(20, slower=(6.0, 1.0))
    pipeline.run(20, slower=(3.0, 1.0))  # better, and not well: what is told does not come and go
    assert len(pipeline.news) == 1
    pipeline.run(20)
    assert pipeline.news[1:] == ["stage 0 crawls no longer"] and pipeline.crawling.told() == {}


@pytest.mark.parametrize(
    ("slower", "seconds"),
    [
        ((8.0, 8.0), (FIRST, LAST)),
        ((9.0, 3.0), (FIRST, LAST)),
        ((5.0, 7.0, 6.0), (FIRST, FIRST, LAST)),
        ((30.0,), (LAST,)),
        ((3.5, 1.0), (FIRST, LAST)),
    ],
    ids=["all alike", "all, not alike", "three", "a stage alone has none to compare with", "a little"],
)
def test_a_loaded_machine_is_no_crawling_stage(
    slower: tuple[float, ...], seconds: tuple[tuple[float, ...], ...]
) -> None:
    """They slow down together, as on two cores that others use; or one has slowed down by less than it takes."""
    pipeline = Pipeline(seconds)
    pipeline.run(20)
    pipeline.run(300, slower)
    assert pipeline.news == [] and pipeline.crawling.to_replace(30) is None


def test_larger_steps_prompts_beside_decodes_and_longer_contexts_are_no_crawl() -> None:
    """What a step costs changes a hundredfold, of which its rows and draws tell the half."""
    pipeline = Pipeline()
    pipeline.run(20)
    pipeline.run(60, rows=lambda i: (512, 0, 60.0) if i % 3 == 0 else (8, 8, 2.0))
    pipeline.run(60, rows=lambda i: (64, 64, 6.0))
    pipeline.run(60, rows=lambda i: (64, 1, 3.0))
    pipeline.run(100, rows=lambda i: (1, 1, 1.0 + min(9.0, i / 500)))
    assert pipeline.news == []


def test_the_last_stage_which_alone_pays_for_draws_is_compared_with_itself_by_draws() -> None:
    """Rows of a prompt draw nothing; as many sequences draw a token each, which may cost more than its layers."""
    pipeline = Pipeline()
    drawing = [1.0]

    def rows(i: int) -> tuple[int, int, float]:
        return (64, 64, 1.0) if drawing[0] > 1 else (64, 0, 1.0)

    pipeline.run(20, rows=rows)
    drawing[0] = 6.0
    pipeline.run(60, slower=(1.0, 6.0), rows=rows)
    assert pipeline.news == []


def test_a_cold_start_is_not_its_pace_and_one_long_step_no_crawl() -> None:
    pipeline = Pipeline()
    pipeline.run(5, slower=(1.0, 6.0))  # compiles, reads its weights for the first time
    pipeline.run(60)
    pipeline.paces[0].took(1, 1, 60.0)  # a process that was stopped for a minute
    pipeline.run(60)
    assert pipeline.news == [] and pipeline.crawling.to_replace(9) is None


def test_a_new_epoch_begins_to_compare_anew() -> None:
    """A spare that took the place has a pace of its own."""
    pipeline = Pipeline()
    pipeline.run(10)
    pipeline.run(20, slower=(6.0, 1.0))
    assert pipeline.crawling.told()
    pipeline.epoch, pipeline.paces = 8, [Pace(), Pace()]
    pipeline.look()
    assert pipeline.crawling.told() == {}
    pipeline.run(60, slower=(6.0, 1.0))
    assert pipeline.crawling.told() == {}


def test_of_stages_that_wait_for_each_other_within_their_steps_the_first_is_named() -> None:
    """Rows that are lent from GPU to GPU make those behind the slow one slow too; those before it are not."""
    pipeline = Pipeline((FIRST, FIRST, FIRST, LAST))
    pipeline.run(20)
    pipeline.run(50, slower=(1.0, 6.0, 6.0, 1.0))
    found = pipeline.crawling.to_replace(30)
    assert found is not None and found[0] == 1


def test_stages_at_work_count_the_same_steps(tiny: tuple[MemoryStore, Manifest]) -> None:
    """Those with rows, of each size from the seventeenth on; and what each took is never less than nothing."""
    store, manifest = tiny

    async def answer() -> list[Pace]:
        pipeline = LocalPipeline(store, manifest, stages=2, options=LoadOptions("cpu", "float32", 16, 1))
        try:
            asked = GenerationRequest(
                RequestId("r"), manifest.cid, tuple(range(3, 20)), 60, Sampling(0), (), b"", fresh_salt()
            )
            assert [event async for event in pipeline.generate(asked)]
            return [stage.pace for stage in pipeline.stages]
        finally:
            pipeline.close()

    first, last = asyncio.run(answer())
    assert first.steps == last.steps >= 59 - 16
    assert all(pace.took_s > 0 and pace.usual_s > 0 for pace in (first, last))


words = st.recursive(
    st.none() | st.integers() | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)


@given(st.lists(st.fixed_dictionaries({"stage": words, "layers": words, "pace": words}), max_size=3))
def test_whatever_another_operator_says_breaks_nothing(said: list[Value]) -> None:
    pipeline = Pipeline()
    for _ in range(3):
        assert pipeline.crawling.look([*pipeline.said(), *said], 7) == []


@given(st.lists(st.tuples(st.integers(-(1 << 60), 1 << 60), st.integers(), st.integers()), min_size=2, max_size=4))
def test_counts_of_any_size_and_order_break_nothing(counts: list[tuple[int, int, int]]) -> None:
    crawling = Crawling()
    for steps, took, usual in counts:
        pace: Value = {"steps": steps, "took_us": took, "usual_us": usual}
        crawling.look([{"stage": i, "layers": [i, i + 1], "pace": pace} for i in range(2)], 7)
