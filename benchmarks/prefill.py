"""How fast is a prompt read? Tokens per second by its length and by the step budget, beside transformers' forward.

    python -m benchmarks.prefill [--lengths 64 256 1024] [--budgets 128 512 2048] [--stages 1] [--repeats 2]

SmolLM2-135M in float32 on a CPU. Ours: from submission to the first token of a request that asks for one, so
scheduler, sampler and hashes are in it. transformers: one forward over the whole prompt that returns the last row's
logits and the cache, on the same values and threads. Runs take turns; the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import PublishedModel, greedy, published, random_prompt
from benchmarks.parity import reference_model
from benchmarks.report import Result, save
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FailedEvent, TokensEvent
from shard_tools.checkpoint.source import open_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 512, 2048], help="tokens in one step")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), a.model)
        rates = asyncio.run(measure(model, a.lengths, a.budgets, a.stages, a.repeats))
    figures = {"model": model.manifest.name, "stages": a.stages, "threads": torch.get_num_threads()}
    save(Result("prefill", figures | {"prompt_tokens_per_s": rates}), a.out)
    return 0


async def measure(
    model: PublishedModel, lengths: list[int], budgets: list[int], stages: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Reader -> prompt length -> tokens per second."""
    pages = max(lengths) // 16 + 8
    pipelines = {f"step of {n}": model.pipeline(stages, LocalLimits(n_pages=pages, max_step_tokens=n)) for n in budgets}
    reference = reference_model(open_checkpoint(model.checkpoint), torch.float32)
    best: dict[str, dict[str, float]] = {name: {} for name in [*pipelines, "transformers"]}
    draw = random.Random(0)
    for pipeline in pipelines.values():
        await first_token_s(pipeline, model, random_prompt(draw, model.manifest, 32))
    for length in lengths:
        for _ in range(repeats):
            prompt = random_prompt(draw, model.manifest, length)
            times = {name: await first_token_s(pipeline, model, prompt) for name, pipeline in pipelines.items()}
            times["transformers"] = forward_s(reference, prompt)
            for name, seconds in times.items():
                best[name][str(length)] = round(max(best[name].get(str(length), 0.0), length / seconds), 1)
    for pipeline in pipelines.values():
        pipeline.close()
    return best


async def first_token_s(pipeline: LocalPipeline, model: PublishedModel, prompt: tuple[int, ...]) -> float:
    """Seconds from submission to the first token."""
    began, taken = time.perf_counter(), 0.0
    async for event in pipeline.generate(greedy(model.manifest, prompt, 1)):
        if isinstance(event, TokensEvent):
            taken = time.perf_counter() - began
        elif isinstance(event, FailedEvent):
            raise SystemExit(f"a request failed: {event.message}")
    return taken


@torch.inference_mode()
def forward_s(model: Any, prompt: tuple[int, ...]) -> float:
    """Seconds of one forward with a cache, logits of the last row only."""
    began = time.perf_counter()
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    assert int(out.logits.argmax()) >= 0
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
