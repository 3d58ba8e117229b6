"""Greedy answers of tiny random models, cut into stages, equal transformers' own: per family, token for token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2")
TOKENS = 10
PROMPTS = tuple(tuple((37 * i + 11 * n) % 500 + 3 for i in range(n)) for n in (1, 5, 17, 41, 60))


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_equals_transformers(family: str, tmp_path: Path) -> None:
    """With 1, 2 and 3 stages; prompts longer than a step and than a sliding window; all requests at once."""
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", family, layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [answer_of(model, prompt) for prompt in PROMPTS]
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "tiny", "float32")

    async def answers(stages: int) -> list[list[int]]:
        limits = LocalLimits(n_pages=128, max_step_tokens=16)
        options = LoadOptions("cpu", "float32", 4, None)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)

        async def one(i: int) -> list[int]:
            id, sampling = RequestId(str(i)), Sampling(0)
            asked = GenerationRequest(id, manifest.cid, PROMPTS[i], TOKENS, sampling, (), b"", fresh_salt())
            events = [event async for event in pipeline.generate(asked)]
            return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens]

        try:
            return list(await asyncio.gather(*(one(i) for i in range(len(PROMPTS)))))
        finally:
            pipeline.close()

    for stages in (1, 2, 3):
        for prompt, want, got in zip(PROMPTS, expected, asyncio.run(answers(stages)), strict=True):
            assert want == got or margin_where_they_part(model, prompt, want, got) < 1e-4


@torch.inference_mode()
def answer_of(model: torch.nn.Module, prompt: tuple[int, ...]) -> list[int]:
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    out = model.generate(torch.tensor([prompt]), **length, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    return list(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def margin_where_they_part(model: torch.nn.Module, prompt: tuple[int, ...], want: list[int], got: list[int]) -> float:
    place = next(n for n, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
    best = model(torch.tensor([[*prompt, *want[:place]]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])
