"""The pipeline says what transformers says, on real weights; benchmarks/parity.py asks 20 x 64 tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from benchmarks import parity
from serve_app.api.text import TextCodec
from serve_app.demo import demo_model
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.fetch import read_file
from shard_tools.store.directory import DirectoryStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 12


def test_greedy_answers_equal_transformers_with_any_number_of_stages(tmp_path: Path) -> None:
    """Token for token, unless transformers' own two best logits are closer than 1e-4."""
    checkpoint = open_checkpoint(demo_model())
    store = DirectoryStore(tmp_path)
    manifest = split(checkpoint, store, "parity", "float32")
    text = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
    prompts = [text.encode_chat([{"role": "user", "content": q}]) for q in parity.QUESTIONS[:3]]
    reference = parity.reference_model(checkpoint, torch.float32)
    expected = [parity.answer_of(reference, prompt, TOKENS) for prompt in prompts]
    for stages in (1, 2, 3, 5):
        got, _ = asyncio.run(parity.answers_of(store, manifest, stages, prompts, TOKENS))
        for i, prompt in enumerate(prompts):
            found = parity.diverges(reference, stages, i, prompt, expected[i], got[i])
            assert found is None or found.margin < parity.ALLOWED_MARGIN, found
