"""What does a cache of prefixes save? Time to the first token and throughput where prompts begin alike.

    python -m benchmarks.prefix_cache [--model smollm2] [--users 8] [--turns 4] [--system 256] [--anyway]

Two loads: users who share a system prompt and each ask one question, and chats whose every turn repeats all before it.
Each runs twice on one pipeline with prompts of the same lengths: as it is, and with another first token each time, so
that nothing can be found again ("missed"). A build whose status counts no hits has no prefix cache; the script says so
and measures nothing, unless asked to (--anyway: both runs should then be equal).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.counters import prefix_hits
from benchmarks.models import PublishedModel, greedy, published, random_prompt
from benchmarks.report import Result, save
from benchmarks.spread import percentiles
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FailedEvent, TokensEvent

Ids = tuple[int, ...]


@dataclass(slots=True)
class Load:
    """What came of one load."""

    ttft_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """In figures."""
        rate = round(self.answer_tokens / self.seconds, 2)
        return {"ttft_ms": percentiles(self.ttft_ms), "answer_tokens_per_s": rate, "prompt_tokens": self.prompt_tokens}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system", type=int, default=256, help="tokens of the shared system prompt")
    parser.add_argument("--question", type=int, default=24, help="tokens of each question")
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--anyway", action="store_true", help="measure a build without a prefix cache too")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), a.model)
        figures = asyncio.run(
            measure(model, a.stages, a.users, a.turns, (a.system, a.question, a.answer), anyway=a.anyway)
        )
    if figures is None:
        print("no prefix cache in this build: the pipeline's status counts no hits")
        return 0
    named = {"model": model.manifest.name, "stages": a.stages, "users": a.users, "turns": a.turns, "system": a.system}
    save(Result("prefix_cache", named | figures), a.out)
    return 0


async def measure(
    model: PublishedModel, stages: int, users: int, turns: int, lengths: tuple[int, int, int], *, anyway: bool
) -> dict[str, Any] | None:
    """Figures of both loads, reused and missed; None if there is no cache to measure."""
    pipeline = model.pipeline(stages, LocalLimits(n_pages=4096), prefix_cache=True)
    await pipeline.warm_up()
    if prefix_hits(pipeline.head.status()) is None and not anyway:
        pipeline.close()
        return None
    figures: dict[str, Any] = {}
    for name, load in (("shared_system_prompt", _shared), ("multi_turn", _chats)):
        figures[name] = {}
        for way in ("missed", "reused"):  # in this order: what the first leaves behind is of no use to the second
            before = prefix_hits(pipeline.head.status()) or 0
            result = await load(pipeline, model, users, turns, lengths, _marks(model, way))
            hits = (prefix_hits(pipeline.head.status()) or 0) - before
            figures[name][way] = result.figures() | {"hits": hits}
    pipeline.close()
    return figures


def _marks(model: PublishedModel, way: str) -> Callable[[Ids], Ids]:
    """The prompt with another first token each time, or as it is."""
    if way == "reused":
        return lambda prompt: prompt
    fresh = itertools.cycle(range(100, min(model.manifest.vocab_size, 40_000)))
    return lambda prompt: (next(fresh), *prompt[1:])


async def _shared(
    pipeline: LocalPipeline,
    model: PublishedModel,
    users: int,
    turns: int,
    lengths: tuple[int, int, int],
    mark: Callable[[Ids], Ids],
) -> Load:
    """Users times turns questions after one system prompt, `users` of them at a time."""
    system, question, answer = lengths
    draw, load = random.Random(1), Load()
    shared = random_prompt(draw, model.manifest, system)
    prompts = [mark(shared + random_prompt(draw, model.manifest, question)) for _ in range(users * turns)]
    began = time.perf_counter()
    for at in range(0, len(prompts), users):
        await asyncio.gather(*(_ask(pipeline, model, p, answer, load) for p in prompts[at : at + users]))
    load.seconds = time.perf_counter() - began
    return load


async def _chats(
    pipeline: LocalPipeline,
    model: PublishedModel,
    users: int,
    turns: int,
    lengths: tuple[int, int, int],
    mark: Callable[[Ids], Ids],
) -> Load:
    """Each user's turns one after another, all users at a time."""
    system, question, answer = lengths
    load = Load()

    async def chat(user: int) -> None:
        draw = random.Random(f"chat {user}")
        history = random_prompt(draw, model.manifest, system // 2)
        for _ in range(turns):
            prompt = mark(history + random_prompt(draw, model.manifest, question))
            history = prompt + await _ask(pipeline, model, prompt, answer, load)

    began = time.perf_counter()
    await asyncio.gather(*(chat(user) for user in range(users)))
    load.seconds = time.perf_counter() - began
    return load


async def _ask(pipeline: LocalPipeline, model: PublishedModel, prompt: Ids, tokens: int, load: Load) -> Ids:
    began, answer = time.perf_counter(), ()
    async for event in pipeline.generate(greedy(model.manifest, prompt, tokens)):
        if isinstance(event, TokensEvent):
            if not answer:
                load.ttft_ms.append((time.perf_counter() - began) * 1e3)
            answer = (*answer, *event.tokens)
        elif isinstance(event, FailedEvent):
            raise SystemExit(f"a request failed: {event.message}")
    load.prompt_tokens += len(prompt)
    load.answer_tokens += len(answer)
    return answer


if __name__ == "__main__":
    sys.exit(main())
