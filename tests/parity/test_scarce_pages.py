"""With scarce pages and shared ones, answers still equal transformers' own, and receipts hold."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.receipts.check import check, check_against_manifest
from serve_app.receipts.receipt import Receipt
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

TOKENS = 24
PROMPTS = tuple(tuple((37 * i + 11 * n) % 500 + 3 for i in range(n)) for n in (9, 17, 30, 41))
Published = tuple[MemoryStore, Manifest, torch.nn.Module]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("scarce") / "checkpoint", "qwen3", layers=3)
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "tiny", "float32")
    return store, manifest, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def is_greedy(model: torch.nn.Module, prompt: tuple[int, ...], tokens: list[int]) -> bool:
    """Whether each token is the model's own choice after those before it, but for a margin below 1e-4."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    drawn = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits.max(1).values - drawn < 1e-4).all())


async def answer(
    pipeline: LocalPipeline, prompt: tuple[int, ...], name: str, n: int = TOKENS
) -> tuple[list[int], Receipt]:
    """Tokens and checked receipt."""
    manifest = pipeline.manifest
    asked = GenerationRequest(RequestId(name), manifest.cid, prompt, n, Sampling(0), (), b"", fresh_salt())
    tokens: list[int] = []
    async for event in pipeline.generate(asked):
        if isinstance(event, TokensEvent):
            tokens += event.tokens
    assert isinstance(event, FinishedEvent) and event.reason == "length", event
    checked = check(event.receipt, pipeline.operator.public, now_s=int(time.time()))
    check_against_manifest(checked, manifest)
    assert list(checked.receipt.out_ids) == tokens
    return tokens, checked.receipt


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_preempted_requests_are_answered_as_if_nothing_had_happened(published: Published, stages: int) -> None:
    """Statements and receipt say which attempt it was; rows of abandoned ones are counted apart, on every stage."""
    store, manifest, model = published

    async def main() -> None:
        options = LoadOptions("cpu", "float32", 4, None)
        limits = LocalLimits(n_pages=24, max_step_tokens=16)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)
        try:
            answers = await asyncio.gather(*(answer(pipeline, p, str(i)) for i, p in enumerate(PROMPTS)))
            for prompt, (tokens, _) in zip(PROMPTS, answers, strict=True):
                assert len(tokens) == TOKENS and is_greedy(model, prompt, tokens)
            status = pipeline.head.status()
            assert status["preemptions"] == sum(receipt.attempt for _, receipt in answers) >= 1
            assert status["free_pages"] == 24
            for stage in pipeline.stages:
                assert stage.witness.rows_hashed == status["rows_run"]
                assert stage.witness.rows_hashed == sum(len(p) + TOKENS - 1 for p in PROMPTS)
                assert stage.witness.rows_abandoned == status["rows_abandoned"]
        finally:
            pipeline.close()

    asyncio.run(main())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_turns_of_a_chat_and_prompts_that_begin_alike_are_not_computed_again(published: Published, stages: int) -> None:
    """Their receipts are over all positions all the same; rows hashed before are counted apart."""
    store, manifest, model = published

    async def main() -> None:
        options = LoadOptions("cpu", "float32", 16, None)
        limits = LocalLimits(n_pages=40, max_step_tokens=32, prefix_cache=True)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)
        try:
            beginning = tuple((37 * i) % 500 + 3 for i in range(35))  # two pages and three tokens
            first, _ = await answer(pipeline, beginning, "first", 30)
            prompts = [
                (*beginning, *first, 7, 8, 9),  # the next turn: 64 rows of it ran
                (*beginning, 11, 12),
                beginning[:32],  # two pages: the row of the last token must run, and so its page
                (*beginning[:20], *range(100, 120)),
            ]
            answers = await asyncio.gather(*(answer(pipeline, p, str(i)) for i, p in enumerate(prompts)))
            for prompt, (tokens, receipt) in zip(prompts, answers, strict=True):
                assert len(tokens) == TOKENS and is_greedy(model, prompt, tokens) and receipt.attempt == 0
            status = pipeline.head.status()
            assert status["cached_tokens"] == 64 + 32 + 16 + 16
            assert status["prompt_tokens"] == len(beginning) + sum(map(len, prompts))
            assert status["free_pages"] == 40
            for stage in pipeline.stages:
                assert stage.witness.rows_hashed == status["rows_run"]
                assert stage.witness.rows_reused == status["cached_tokens"]
        finally:
            pipeline.close()

    asyncio.run(main())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_preempted_request_finds_its_own_pages_again(published: Published, stages: int) -> None:
    """Scarce pages and the cache together: some pages are still there, some were taken."""
    store, manifest, model = published

    async def main() -> None:
        options = LoadOptions("cpu", "float32", 16, None)
        limits = LocalLimits(n_pages=8, max_step_tokens=32, prefix_cache=True)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)
        try:
            prompts = [tuple((37 * i + 11 * n) % 500 + 3 for i in range(n)) for n in (20, 25, 30, 31)]
            answers = await asyncio.gather(*(answer(pipeline, p, str(i), 40) for i, p in enumerate(prompts)))
            for prompt, (tokens, _) in zip(prompts, answers, strict=True):
                assert len(tokens) == 40 and is_greedy(model, prompt, tokens)
            status = pipeline.head.status()
            assert status["preemptions"] == sum(receipt.attempt for _, receipt in answers) >= 1
            assert status["free_pages"] == 8
            for stage in pipeline.stages:
                assert stage.witness.rows_hashed == status["rows_run"]
                assert stage.witness.rows_abandoned == status["rows_abandoned"]
                assert stage.witness.rows_hashed + stage.witness.rows_reused == sum(len(p) + 39 for p in prompts)
            assert pipeline.stages[0].witness.rows_reused > 0
        finally:
            pipeline.close()

    asyncio.run(main())


@pytest.mark.parametrize("stages", [1, 2])
def test_requests_stopped_while_pages_are_scarce_keep_what_they_were_told(published: Published, stages: int) -> None:
    """Preempted or not when the ingress finds a stop string: the receipt is over exactly the tokens streamed."""
    store, manifest, model = published

    async def main() -> None:
        options = LoadOptions("cpu", "float32", 4, None)
        limits = LocalLimits(n_pages=24, max_step_tokens=16)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)

        async def stopped(i: int, prompt: tuple[int, ...]) -> None:
            id, tokens = RequestId(str(i)), list[int]()
            asked = GenerationRequest(id, manifest.cid, prompt, 40, Sampling(0), (), b"", fresh_salt())
            async for event in pipeline.generate(asked):
                if isinstance(event, TokensEvent):
                    tokens += event.tokens
                    if len(tokens) == 8 + 4 * i:
                        await pipeline.stop(id)
            assert isinstance(event, FinishedEvent) and event.reason == "stop", event
            checked = check(event.receipt, pipeline.operator.public, now_s=int(time.time()))
            assert list(checked.receipt.out_ids) == tokens and is_greedy(model, prompt, tokens)

        try:
            await asyncio.gather(*(stopped(i, prompt) for i, prompt in enumerate(PROMPTS)))
            assert pipeline.head.status()["free_pages"] == 24
        finally:
            pipeline.close()

    asyncio.run(main())
