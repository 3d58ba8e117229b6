"""Penalties, biases and min-p in 1 to 3 stages: transformers' answers, and PROTOCOL.md's rule on its logits."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    MICRO,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.commitment import noise_key
from serve_app.receipts.receipt import Receipt
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.serve_app.engine import sampling_rule as rule
from tests.tiny_models import write_tiny_checkpoint

TOKENS = 24
PROMPT = tuple((37 * i) % 40 + 3 for i in range(21))
ASKED = (
    Sampling(0, repetition_micro=1_300_000),
    Sampling(0, presence_micro=2 * MICRO, frequency_micro=500_000),
    Sampling(0, logit_bias=((77, 100 * MICRO), (78, -100 * MICRO))),
    Sampling(1_200_000, seed=5, min_p_micro=50_000),
    Sampling(900_000, 50, 950_000, 6, 10_000, 400_000, 300_000, 1_100_000, ((4, 3 * MICRO), (9, -MICRO))),
    Sampling(0),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, MemoryStore, Manifest]:
    folder, store = write_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama", layers=3), MemoryStore()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded, store, split(open_checkpoint(folder), store, "tiny", "float32")


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_controls_hold_in_any_number_of_stages(
    stages: int, model: tuple[torch.nn.Module, MemoryStore, Manifest]
) -> None:
    """All at once, the prompt in two chunks; what a receipt says of them is what was asked."""
    loaded, store, manifest = model

    async def answers() -> list[tuple[list[int], Sampling]]:
        options, limits = LoadOptions("cpu", "float32", 4, None), LocalLimits(n_pages=128, max_step_tokens=16)
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=limits)

        async def one(i: int) -> tuple[list[int], Sampling]:
            asked = GenerationRequest(RequestId(str(i)), manifest.cid, PROMPT, TOKENS, ASKED[i], (), b"", fresh_salt())
            events = [event async for event in pipeline.generate(asked)]
            assert isinstance(events[-1], FinishedEvent)
            said = Receipt.decode(Bundle.decode(events[-1].receipt).receipt.payload).sampling
            return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens], said

        try:
            return list(await asyncio.gather(*(one(i) for i in range(len(ASKED)))))
        finally:
            pipeline.close()

    for asked, (drawn, said) in zip(ASKED, asyncio.run(answers()), strict=True):
        assert said == asked
        assert drawn == by_the_rule(loaded, asked)
        if asked.repetition_micro != MICRO and asked.temperature_micro == 0:
            assert drawn == generated(loaded, asked.repetition_micro / MICRO)
    assert {77} == set(by_the_rule(loaded, ASKED[2])) and by_the_rule(loaded, ASKED[0]) != by_the_rule(loaded, ASKED[5])


@torch.inference_mode()
def by_the_rule(model: torch.nn.Module, asked: Sampling) -> list[int]:
    drawn: list[int] = []
    key = noise_key(asked, b"", bytes(32))
    while len(drawn) < TOKENS:
        logits = model(torch.tensor([[*PROMPT, *drawn]])).logits[0, -1].tolist()
        drawn.append(rule.token(logits, asked, key, len(PROMPT) + len(drawn), PROMPT, drawn))
    return drawn


@torch.inference_mode()
def generated(model: torch.nn.Module, repetition_penalty: float) -> list[int]:
    out = model.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(PROMPT) :].tolist())
