"""Does it still serve, equally well, after an hour of everything that clients do? An acceptance test, not a race.

    python -m benchmarks.soak [--minutes 10] [--http] [--model tiny] [--stages 2] [--clients 24]

Clients ask at random moments: short and long prompts, short and long answers, some with a stop string, some hang up in
the middle; there are KV pages for a few of them only. It fails unless

- every request ends, and none waits longer for its first text than SLACK times its fair share (the work that was there
  before it, at the speed of the run) and GRACE_S;
- every greedy answer is transformers' answer to that prompt alone (up to a stop string where it has one); one may part
  where transformers' two best logits are less than 1e-4 apart, and such partings are counted;
- every request that was not hung up has a receipt that verifies, and the rows hashed are those the receipts speak of;
- afterwards every page is free, nothing runs or waits, and memory, threads and open files have not grown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.counters import free_pages, preemptions, prefix_hits, rows_problem
from benchmarks.models import PAGE_SIZE, PublishedModel, published, random_prompt
from benchmarks.parity import ALLOWED_MARGIN, answer_of, diverges, reference_model
from benchmarks.process_watch import ProcessWatch
from benchmarks.report import Result, save
from benchmarks.soak_doors import OVERLOADED, Asked, Door, Got, HttpDoor, LocalDoor
from benchmarks.spread import percentiles
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.receipts.check import check
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.errors import LlmdError

SLACK, GRACE_S = 4.0, 3.0
PATIENCE_S = 120.0  # a request that has not ended by then never will
STEP_TOKENS, RUNNING = 64, 12
LONG_ROWS = 320  # of the longest prompt and answer together


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and transformers' answer to it alone, up to what ends an answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(slots=True)
class Tally:
    """What happened so far; sums only, so that its own growth is not taken for a leak."""

    ended: int = 0
    hung_up: int = 0
    stopped: int = 0  # by a stop string
    overloaded: int = 0
    tokens: int = 0
    receipts_rows: int = 0
    cancelled_rows: int = 0  # at most
    partings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    shares: list[tuple[float, int]] = field(default_factory=list)  # seconds to the first text, rows before it
    live_rows: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--http", action="store_true", help="through a real HTTP server in this process")
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=40, help="different ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), a.model)
        figures, problems = soak(
            model,
            seconds=60 * a.minutes,
            stages=a.stages,
            clients=a.clients,
            prompts=a.prompts,
            http=a.http,
            seed=a.seed,
        )
    save(Result("soak", figures | {"model": model.manifest.name, "problems": problems}), a.out)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(bool(problems))


def soak(
    model: PublishedModel, *, seconds: float, stages: int, clients: int, prompts: int, http: bool, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures of one run, and what was wrong."""
    reference = reference_model(open_checkpoint(model.checkpoint), torch.float32)
    draw = random.Random(seed)
    known = [_know(reference, model, draw, i) for i in range(prompts)]
    return asyncio.run(_soak(model, reference, known, seconds, stages, clients, http, seed))


def _know(reference: Any, model: PublishedModel, draw: random.Random, i: int) -> Known:
    tokens = draw.choice((4, 16, 48, 120))
    n = draw.choice((1, 7, 33, 90, LONG_ROWS - tokens)) if i else LONG_ROWS - tokens  # the longest is there for sure
    prompt = random_prompt(draw, model.manifest, n)
    answer = answer_of(reference, prompt, tokens)
    ends = [k for k, token in enumerate(answer) if token in model.text.stop_ids]
    return Known(prompt, tuple(answer[: ends[0] + 1] if ends else answer))


async def _soak(
    model: PublishedModel,
    reference: Any,
    known: list[Known],
    seconds: float,
    stages: int,
    clients: int,
    http: bool,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    # Room for about four of the longest requests at a time, where RUNNING may run.
    n_pages = 4 * (LONG_ROWS // PAGE_SIZE)
    limits = LocalLimits(
        n_pages=n_pages, max_step_tokens=STEP_TOKENS, max_running=RUNNING, max_waiting=max(2, 3 * clients // 4)
    )
    pipeline = model.pipeline(stages, limits, prefix_cache=True)
    await pipeline.warm_up()
    door: Door = HttpDoor(pipeline, model) if http else LocalDoor(pipeline, model)
    before, rows_before = dict(pipeline.head.status()), _rows(pipeline)
    tally, watch = Tally(), ProcessWatch()
    began = time.perf_counter()
    end = began + seconds
    watching = asyncio.create_task(_watch(watch, pipeline, seconds))
    await asyncio.gather(
        *(
            _client(door, pipeline, model, reference, known, tally, random.Random(f"{seed}/{i}"), end)
            for i in range(clients)
        )
    )
    took = time.perf_counter() - began
    watching.cancel()
    await door.close()
    after = await _idle(pipeline)
    problems = tally.failures[:10] + watch.problems()
    if after["running"] or after["waiting"]:
        problems.append(f"{after['running']} requests run and {after['waiting']} wait after all clients have gone")
    if free_pages(after, n_pages) != n_pages:
        problems.append(f"{free_pages(after, n_pages)} of {n_pages} pages are free at the end")
    hashed, reused = (
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(_rows(pipeline), rows_before, strict=True)
    )
    wrong = rows_problem(before, after, hashed, tally.receipts_rows, reused=reused, cancelled_rows=tally.cancelled_rows)
    if wrong:
        problems.append(wrong)
    rows_run = int(after["rows_run"]) - int(before["rows_run"])
    rate = rows_run / took
    waits = [first_s / (SLACK * rows / rate + GRACE_S) for first_s, rows in tally.shares]
    starved = sum(wait > 1 for wait in waits)
    if starved:
        problems.append(f"{starved} requests waited too long for their first text, one {max(waits):.1f} times")
    pipeline.close()
    return {
        "seconds": round(took, 1),
        "door": "http" if http else "local",
        "stages": stages,
        "clients": clients,
        "pages": n_pages,
        "requests_ended": tally.ended,
        "hung_up": tally.hung_up,
        "stopped_by_string": tally.stopped,
        "refused_overloaded": tally.overloaded,
        "answers_parted": tally.partings,
        "answer_tokens_per_s": round(tally.tokens / took, 1),
        "first_text_ms": percentiles(tally.first_ms),
        "longest_wait_of_its_bound": round(max(waits, default=0.0), 2),
        "rows_run": rows_run,
        "rows_hashed": hashed,
        "rows_reused": reused,
        "rows_of_receipts": tally.receipts_rows,
        "preemptions": preemptions(after),
        "prefix_hits": prefix_hits(after),
        **watch.figures(),
    }, problems


def _rows(pipeline: LocalPipeline) -> tuple[list[int], list[int]]:
    """Rows that each stage hashed, and rows whose hashes it had already."""
    witnesses = [stage.witness for stage in pipeline.stages]
    return [w.rows_hashed for w in witnesses], [getattr(w, "rows_reused", 0) for w in witnesses]


async def _client(
    door: Door,
    pipeline: LocalPipeline,
    model: PublishedModel,
    reference: Any,
    known: list[Known],
    tally: Tally,
    draw: random.Random,
    end: float,
) -> None:
    while time.perf_counter() < end:
        await asyncio.sleep(draw.expovariate(1 / 0.1))
        item = draw.choice(known)
        asked, expected = _asked(model, item, draw)
        rows = len(asked.prompt) + asked.tokens - 1
        before, tally.live_rows = tally.live_rows, tally.live_rows + rows
        got = await door.ask(asked, PATIENCE_S)
        tally.live_rows -= rows
        if got.error == OVERLOADED:
            tally.overloaded += 1
            continue
        if got.error is not None:
            tally.failures.append(got.error)
            tally.cancelled_rows += rows
            continue
        tally.ended += 1
        if got.first_s is not None:
            tally.first_ms.append(got.first_s * 1e3)
            tally.shares.append((got.first_s, before + len(asked.prompt)))
        if got.hung_up:
            tally.hung_up += 1
            tally.cancelled_rows += rows
            continue
        tally.stopped += asked.stop is not None
        _judge(got, asked, expected, item, pipeline, reference, tally)


def _asked(model: PublishedModel, item: Known, draw: random.Random) -> tuple[Asked, str]:
    """A request for it, and the text that must come."""
    text, tokens = model.text.decode(item.answer), len(item.answer)
    kind = draw.random()
    if kind < 0.2 and tokens > 2:
        return Asked(item.prompt, tokens, hang_up_after=draw.randint(1, tokens - 1)), text
    if kind < 0.4 and len(text) > 3:
        at = draw.randrange(1, len(text) - 1)
        stop = text[at : at + draw.randint(1, 4)]
        if "�" not in stop:
            return Asked(item.prompt, tokens, stop=stop), text[: text.index(stop)]
    return Asked(item.prompt, tokens), text


def _judge(
    got: Got, asked: Asked, expected: str, item: Known, pipeline: LocalPipeline, reference: Any, tally: Tally
) -> None:
    """The receipt verifies and speaks of the answer that transformers gives."""
    try:
        checked = check(got.receipt, pipeline.operator.public, now_s=int(time.time()))
    except LlmdError as e:
        tally.failures.append(f"a receipt does not verify: {e}")
        return
    out = list(checked.receipt.out_ids)
    tally.tokens += len(out)
    tally.receipts_rows += checked.statements[0].n_rows
    parting = diverges(reference, len(pipeline.stages), 0, item.prompt, list(item.answer[: len(out)]), out)
    if parting is not None and parting.margin <= ALLOWED_MARGIN:
        tally.partings.append(f"token {parting.position}: {parting.margin:.1e}")
    elif parting is not None:
        tally.failures.append(f"an answer is not that of its prompt alone from token {parting.position} on")
    elif got.text != expected:
        tally.failures.append(f"the text {got.text[-40:]!r} came where {expected[-40:]!r} was due, stop {asked.stop!r}")
    elif asked.stop is None and len(out) != len(item.answer):
        tally.failures.append(f"{len(out)} tokens came where {len(item.answer)} were due")


async def _watch(watch: ProcessWatch, pipeline: LocalPipeline, seconds: float) -> None:
    while True:
        watch.look()
        pipeline.head.watch()
        await asyncio.sleep(min(1.0, seconds / 50))


async def _idle(pipeline: LocalPipeline) -> dict[str, Any]:
    """The status once nothing runs and every row is hashed; as it is after 10 s, if that does not come."""
    seen: list[int] = []
    for _ in range(40):
        await asyncio.sleep(0.25)
        status = pipeline.head.status()
        now = [stage.witness.rows_hashed for stage in pipeline.stages]
        if not (status["running"] or status["waiting"] or status["steps_in_flight"]) and now == seen:
            break
        seen = now
    return dict(pipeline.head.status())


if __name__ == "__main__":
    sys.exit(main())
