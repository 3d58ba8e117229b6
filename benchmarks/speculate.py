"""What do guessed tokens gain? Tokens per second with and without, where the answer repeats its prompt and where not.

    python -m benchmarks.speculate [--model smollm2] [--stages 1] [--guesses 8] [--pairs 3] [--tokens 160]

Two pipelines stand in one process and answer the same greedy request in turn, alone: one guesses, the other does not.
The prompts: code to be written again with one change, and a story to be told. Seconds are from the first token to the
last. Fails if an answer with guesses is another than that without.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import PublishedModel, greedy, published
from benchmarks.report import Result, save
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FailedEvent, TokensEvent

_CODE = """def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def histogram(values, bins):
    lowest, highest = min(values), max(values)
    width = (highest - lowest) / bins
    counts = [0] * bins
    for value in values:
        place = min(int((value - lowest) / width), bins - 1)
        counts[place] += 1
    return counts
"""
ASKED = {
    "repeats_its_prompt": f"Write this code again, with the function median renamed to middle_value:\n\n{_CODE}",
    "says_new_things": "Tell me a story about a lighthouse keeper who finds a letter in a bottle.",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, and what its guesses came to."""

    tokens: tuple[int, ...]
    seconds: float  # after the first token
    cpu_s: float  # processor time after the first token
    guesses: int
    right: int

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--guesses", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), a.model)
        figures = asyncio.run(measure(model, a.stages, a.guesses, a.pairs, a.tokens))
    named = {"model": model.manifest.name, "stages": a.stages, "guesses_at_most": a.guesses}
    save(Result("speculate", named | figures), a.out)
    parted = [name for name in ASKED if not figures[name]["same_answer"]]
    if parted:
        print(f"{', '.join(parted)}: the answer with guesses is another", file=sys.stderr)
    return int(bool(parted))


async def measure(model: PublishedModel, stages: int, guesses: int, pairs: int, tokens: int) -> dict[str, Any]:
    """For each prompt: rates of both ways, and how many guesses were right. The first pair warms up."""
    plain = model.pipeline(stages, LocalLimits())
    guessing = model.pipeline(stages, LocalLimits(speculate=guesses))
    figures: dict[str, Any] = {}
    for name, asked in ASKED.items():
        prompt = model.text.encode_chat([{"role": "user", "content": asked}])
        told: dict[str, list[Answer]] = {"without": [], "with": []}
        for i in range(pairs + 1):
            order = [("without", plain), ("with", guessing)]
            for way, pipeline in order if i % 2 else reversed(order):
                answer = await _ask(pipeline, model, prompt, tokens)
                told[way] += [answer] if i else []
        rates = {way: statistics.median(a.rate for a in answers) for way, answers in told.items()}
        last = told["with"][-1]
        figures[name] = {
            "prompt_tokens": len(prompt),
            "answer_tokens": len(last.tokens),
            "without_tokens_per_s": [round(a.rate, 2) for a in told["without"]],
            "with_tokens_per_s": [round(a.rate, 2) for a in told["with"]],
            **{
                f"{way}_processor_ms_per_token": round(
                    statistics.median(1e3 * a.cpu_s / (len(a.tokens) - 1) for a in answers), 1
                )
                for way, answers in told.items()
            },
            "ratio": round(rates["with"] / rates["without"], 3),
            "guesses": last.guesses,
            "right_percent": round(100 * last.right / last.guesses, 1) if last.guesses else None,
            "same_answer": len({a.tokens for answers in told.values() for a in answers}) == 1,
        }
    plain.close()
    guessing.close()
    return figures


async def _ask(pipeline: LocalPipeline, model: PublishedModel, prompt: tuple[int, ...], tokens: int) -> Answer:
    before, answer, began, cpu = pipeline.head.status(), list[int](), 0.0, 0.0
    async for event in pipeline.generate(greedy(model.manifest, prompt, tokens, model.text.stop_ids)):
        if isinstance(event, TokensEvent):
            if not answer:
                began, cpu = time.perf_counter(), time.process_time()
            answer += event.tokens
            ended, cpu_ended = time.perf_counter(), time.process_time()
        elif isinstance(event, FailedEvent):
            raise SystemExit(f"a request failed: {event.message}")
    after = pipeline.head.status()
    guesses, right = (int(str(after[k])) - int(str(before[k])) for k in ("guesses", "guesses_right"))
    return Answer(tuple(answer), ended - began, cpu_ended - cpu, guesses, right)


if __name__ == "__main__":
    sys.exit(main())
