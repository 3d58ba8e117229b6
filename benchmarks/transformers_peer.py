"""transformers' own continuous batching on the requests of benchmarks/serving.py, all at once, without HTTP.

`generate_batch` takes token ids and gives whole answers, so only its throughput is comparable, with our run "all at
once". It takes one length for all answers, here the mean of those asked for, and never ends one early.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.models import ModelChoice, published
from benchmarks.parity import reference_model
from benchmarks.workload import Arrival
from shard_tools.checkpoint.source import open_checkpoint

PAGE_TOKENS = 256  # its default
STEP_TOKENS = 512  # as ours


def generate_batch(choice: ModelChoice, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Seconds and tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), choice)
        reference = reference_model(open_checkpoint(model.checkpoint), torch.float32)
    reference.set_attn_implementation("sdpa")
    prompts = [list(model.text.encode_chat([{"role": "user", "content": a.prompt}])) for a in arrivals]
    each = round(sum(a.answer_tokens for a in arrivals) / len(arrivals))
    config = GenerationConfig(max_new_tokens=each, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left to itself it takes most of the memory for its cache, and a minute to do so.
    longest = max(len(prompt) for prompt in prompts) + each
    blocks = len(prompts) * (longest // PAGE_TOKENS + 1) + 1
    batching = ContinuousBatchingConfig(page_size=PAGE_TOKENS, num_blocks=blocks, max_batch_tokens=STEP_TOKENS)
    began = time.perf_counter()
    out = reference.generate_batch(prompts, config, batching, warmup=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.generated_tokens) for answer in out.values())
    failed = [answer.error for answer in out.values() if answer.error]
    return {
        "transformers": transformers.__version__,
        "requests": len(prompts),
        "errors": len(failed) + len(prompts) - len(out),
        "answer_tokens": tokens,
        "seconds": round(seconds, 2),
        "answer_tokens_per_s": round(tokens / seconds, 2),
    }
