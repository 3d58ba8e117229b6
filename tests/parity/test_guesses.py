"""With guesses, answers equal those without, token for token, and receipts hold: real engines, 1 to 3 stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.receipts.check import check, check_against_manifest
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.choice import Choice
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

VOCAB = 64  # few, so that two tokens stand together again soon
LENGTHS = (9, 17, 30, 41)
PROMPTS = tuple(tuple((7 * i + i * i % 5 + n) % 40 + 3 for i in range(n)) for n in LENGTHS)
WAYS = (
    Sampling(0),
    Sampling(700_000, 0, 950_000, 7),
    Sampling(300_000, 20, 1_000_000, 8),
    Sampling(500_000, 0, 1_000_000, 9, logit_bias=((5, 2_000_000),)),
)
Published = tuple[MemoryStore, Manifest]


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    reason: FinishReason
    attempt: int
    out_root: bytes  # over the rows that left the last layer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("guesses") / "checkpoint"
    store = MemoryStore()
    checkpoint = write_tiny_checkpoint(folder, "qwen3", layers=3, vocab=VOCAB, seed=1)
    return store, split(open_checkpoint(checkpoint), store, "tiny", "float32")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many guesses as there may be are made, whether they pay or not: many must be wrong here."""
    monkeypatch.setattr("serve_app.scheduling.speculation._START", 1.0)
    monkeypatch.setattr("serve_app.scheduling.speculation._STEP", 0.0)
    yield


async def answer(pipeline: LocalPipeline, asked: GenerationRequest, stop_after: int | None = None) -> Answer:
    """Its tokens and how it ended, the receipt checked. stop_after: so many tokens, as for a stop string."""
    tokens: list[int] = []
    async for event in pipeline.generate(asked):
        if isinstance(event, TokensEvent):
            tokens += event.tokens
            if stop_after is not None and len(tokens) >= stop_after:
                await pipeline.stop(asked.id)
    assert isinstance(event, FinishedEvent), event
    checked = check(event.receipt, pipeline.operator.public, now_s=int(time.time()))
    check_against_manifest(checked, pipeline.manifest)
    assert list(checked.receipt.out_ids) == tokens
    return Answer(tuple(tokens), event.reason, checked.receipt.attempt, checked.statements[-1].out_root)


@dataclass(frozen=True)
class Served:
    """What a pipeline was asked, one after another or all at once, and what it said of itself afterwards."""

    answers: list[Answer]
    status: dict[str, int]
    rows_hashed: list[int]


def said(served: Served) -> list[tuple[tuple[int, ...], FinishReason]]:
    """Tokens and endings; which bits the rows had is between engine and batch."""
    return [(a.tokens, a.reason) for a in served.answers]


def serve(
    published: Published,
    engine: str,
    stages: int,
    asked: list[GenerationRequest],
    stop_after: int | None = None,
    *,
    page_size: int = 4,
    one_by_one: bool = False,
    deterministic: bool = False,
    **limits: int,
) -> Served:
    async def main() -> Served:
        store, manifest = published
        options = LoadOptions("cpu", "float32", page_size, None, Choice(engine), deterministic)
        sizes = LocalLimits(**({"n_pages": 200, "max_step_tokens": 16} | limits))
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=sizes)
        try:
            if one_by_one:
                answers = [await answer(pipeline, r, stop_after) for r in asked]
            else:
                answers = list(await asyncio.gather(*(answer(pipeline, r, stop_after) for r in asked)))
            status = {k: v for k, v in pipeline.head.status().items() if isinstance(v, int)}
            assert status["free_pages"] == sizes.n_pages
            return Served(answers, status, [stage.witness.rows_hashed for stage in pipeline.stages])
        finally:
            pipeline.close()

    return asyncio.run(main())


def requests(published: Published, max_tokens: int = 40, stop_ids: tuple[int, ...] = ()) -> list[GenerationRequest]:
    manifest = published[1]
    return [
        GenerationRequest(RequestId(f"r{i}"), manifest.cid, prompt, max_tokens + i, way, stop_ids, b"", fresh_salt())
        for i, (prompt, way) in enumerate(zip(PROMPTS, WAYS, strict=True))
    ]


@pytest.mark.parametrize(
    ("one_by_one", "stages", "engine"),
    [
        (True, 1, "cpu"),
        (False, 2, "torch"),
        *(
            pytest.param(one_by_one, stages, engine, marks=pytest.mark.slow)
            for one_by_one in (True, False)
            for stages in (1, 2, 3)
            for engine in ("torch", "cpu")
            if (one_by_one, stages, engine) not in ((True, 1, "cpu"), (False, 2, "torch"))
        ),
    ],
)
def test_answers_are_the_same_with_guesses(published: Published, engine: str, stages: int, one_by_one: bool) -> None:
    """Greedy and sampled, prompts in chunks, alone and at once; all rows that count are hashed, no others."""
    asked = requests(published)
    plain = serve(published, engine, stages, asked, one_by_one=one_by_one)
    guessed = serve(published, engine, stages, asked, one_by_one=one_by_one, speculate=8)
    assert said(guessed) == said(plain)
    assert 0 < guessed.status["guesses_right"] < guessed.status["guesses"]
    assert set(guessed.rows_hashed) == {guessed.status["rows_run"]} == {plain.status["rows_run"]}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_scarce_pages_and_found_ones_change_nothing(published: Published, stages: int) -> None:
    asked = requests(published)
    plain = serve(published, "torch", stages, asked, page_size=16)
    scarce = serve(published, "torch", stages, asked, page_size=16, n_pages=7, prefix_cache=True, speculate=6)
    assert [a.tokens for a in scarce.answers] == [a.tokens for a in plain.answers]
    assert scarce.status["preemptions"] > 0 < scarce.status["guesses"]
    manifest = published[1]
    turns = [
        GenerationRequest(RequestId(f"t{i}"), manifest.cid, (*prompt, *a.tokens, 7), 30, way, (), b"", fresh_salt())
        for i, (prompt, a, way) in enumerate(zip(PROMPTS, plain.answers, WAYS, strict=True))
    ]
    plain = serve(published, "torch", stages, asked + turns, page_size=16, one_by_one=True)
    cached = serve(
        published, "torch", stages, asked + turns, page_size=16, one_by_one=True, prefix_cache=True, speculate=8
    )
    assert said(cached) == said(plain)
    assert cached.status["cached_tokens"] > 0 < cached.status["guesses_right"]


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_token_or_max_tokens_inside_a_run_of_right_guesses_ends_the_answer_there(
    published: Published, stages: int
) -> None:
    whole = serve(published, "cpu", stages, requests(published)).answers
    for i in (5, 18, 31):
        stop_ids = (whole[0].tokens[i],)
        for asked in (requests(published, stop_ids=stop_ids), requests(published, i)):
            plain = serve(published, "cpu", stages, asked)
            assert said(serve(published, "cpu", stages, asked, speculate=8)) == said(plain)


def test_where_a_rows_bits_are_fixed_the_whole_receipt_is_that_without_guesses(published: Published) -> None:
    """Roots over the rows of every layer boundary included: no void row is in them, and none was read."""
    plain = serve(published, "torch", 2, requests(published), deterministic=True)
    guessed = serve(published, "torch", 2, requests(published), deterministic=True, speculate=8)
    assert guessed.answers == plain.answers and 0 < guessed.status["guesses_right"] < guessed.status["guesses"]


def test_an_answer_that_is_stopped_is_the_beginning_of_the_whole(published: Published) -> None:
    """As when the ingress finds a stop string; tokens that were drawn meanwhile are in the receipt."""
    whole = serve(published, "cpu", 1, requests(published)).answers
    for n in (3, 9, 14):
        stopped = serve(published, "cpu", 1, requests(published), n, speculate=8).answers
        for a, b in zip(stopped, whole, strict=True):
            assert a.reason in ("stop", "length") and len(a.tokens) >= n and a.tokens == b.tokens[: len(a.tokens)]
