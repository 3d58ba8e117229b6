"""What do clients see while parts of the application die, again and again? The real one, on a real Ray, over HTTP.

    python -m benchmarks.churn [--every 60 20] [--minutes 2] [--kill stage=0.7,head=0.1,supervisor=0.1,node=0.1]
    python -m benchmarks.churn --signal SIGSTOP --stopped 60        they hang instead, and wake after a minute
    ... --in-turn --every 75 --minutes 10 --kill stage=1,head=1,supervisor=1,spare=1,gcs=1,raylet=1,controller=1

`--clients` streams at any time, greedy, each compared with the answer to the same request before anything died: same
tokens, text and end, a receipt that verifies. Where the tokens are others, transformers' margin between its two best at
that place decides: below --exact-margin it is counted as parted, else as wrong. failed: the answer began, or was not
refused in order, and did not end as it should; refused: 429 or 503 before any of it.

stall: of a stream that was talking when something died, its longest silence from then to the next death, less its
median one. ready: from the death to /health saying yes again, where it said no. back: to Ray listing another process.
goodput: tokens a second of answers that were right. First comes a load without deaths, for comparison.

Ctrl-C ends it in order, with what it has. It fails if an answer is wrong, if fewer than --need percent are right, or if
anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.churn_deaths import BYSTANDERS, VICTIMS, Death, Health, Reaper
from benchmarks.http_client import Reply
from benchmarks.known_answers import Asker, Judged, Known, Question
from benchmarks.models import PublishedModel
from benchmarks.report import Result, save
from benchmarks.server import OURS, OwnServer, segments
from benchmarks.serving import lengths_text
from benchmarks.spread import percentiles
from benchmarks.workload import poisson
from tests.e2e.cluster import eventually

DEFAULT_KILL = "stage=0.7,head=0.1,supervisor=0.1,node=0.1"
QUESTIONS = 8
AGAIN_S = 0.5  # before the next question, after one that was refused or failed
NOTICED_S = 5.0  # after a load, whose last death may be a moment ago: until it shows at the latest
SETTLE_S = 60.0  # after a load: until all parts are there again and nothing of those that died is


@dataclass(slots=True)
class Load:
    """One load and what was seen of it. every_s: between deaths; None: nothing dies."""

    every_s: float | None
    began_s: float = 0.0
    ended_s: float = 0.0
    answers: list[tuple[Known, Reply, Judged]] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    retried: int = 0  # requests that were sent again under their Idempotency-Key


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--spares", type=int, default=0, help="processes that wait to take a stage's place")
    parser.add_argument("--clients", type=int, default=4, help="streams at any time")
    parser.add_argument("--every", type=float, nargs="+", default=[60.0, 20.0], help="seconds between deaths")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0], help="for all of --every, or one for each")
    parser.add_argument("--undisturbed", type=float, default=30.0, help="seconds of load without deaths, before")
    parser.add_argument("--kill", type=shares, default=shares(DEFAULT_KILL), help=f"default: {DEFAULT_KILL}")
    parser.add_argument("--in-turn", action="store_true", help="one after the other, as named, instead of at random")
    parser.add_argument("--signal", choices=["SIGKILL", "SIGSTOP"], default="SIGKILL")
    parser.add_argument("--stopped", type=float, default=60.0, help="seconds until what SIGSTOP stopped goes on")
    parser.add_argument("--prompts", type=lengths_text, default="8-40", help="words: 64 or 20-200")
    parser.add_argument("--answers", type=lengths_text, default="32-96", help="tokens at most, in the same forms")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds a client waits for a whole answer")
    parser.add_argument("--retries", type=int, default=0, help="of a request that failed, under its Idempotency-Key")
    parser.add_argument("--exact-margin", type=float, default=1e-4)
    parser.add_argument("--need", type=float, default=99.9, help="percent of requests to be right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    if len(a.minutes) not in (1, len(a.every)):
        parser.error(f"{len(a.minutes)} of --minutes for {len(a.every)} of --every")
    nodes = a.stages + 1 if "node" in a.kill else 0  # one more than needed: where one dies, there is room at once
    ingress = {"replicas": 2} if "ingress" in a.kill else None
    server = OwnServer(a.model, a.stages, nodes=nodes, ingress=ingress, kv_memory_bytes=256 << 20, spares=a.spares)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server must not outlive this process
    with server:
        before = _ours(server)
        loads, interrupted = asyncio.run(_all_loads(a, server))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # asyncio gave it back to the system
        eventually(lambda: _ours(server) == before, SETTLE_S, every_s=1.0)
        after = _ours(server)
        settle_margins(server.model, loads, a.exact_margin)
    problems = [f"left behind: {what}" for what in server.left]
    problems += [f"after the deaths there are {after}, before them {before}"] if after != before else []
    runs = [summary(load) for load in loads]
    for run in runs:
        run["goodput_percent"] = round(100 * run["goodput_tokens_per_s"] / (runs[0]["goodput_tokens_per_s"] or 1), 1)
        of = "without deaths" if run["every_s"] is None else f"a death every {run['every_s']:g} s"
        if run["wrong"]:
            problems.append(f"{of}: {run['wrong']} answers are wrong, the first: {run['first_wrong']}")
        if run["right_percent"] < a.need:
            problems.append(f"{of}: {run['right_percent']} % of the requests came out right, {a.need} are needed")
    figures = {"model": a.model, "stages": a.stages, "spares": a.spares, "nodes": nodes, "clients": a.clients}
    figures |= {
        "kill": a.kill,
        "signal": a.signal,
        "answer_tokens": a.answers,
        "interrupted": interrupted,
        "runs": runs,
    }
    save(Result("churn", figures | {"problems": problems}), a.out)
    print("\n".join(table(runs)))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(bool(problems))


def shares(text: str) -> dict[str, float]:
    """`stage=0.7,head=0.3`, checked. Raises ArgumentTypeError."""
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{item!r} is not NAME=SHARE") from e
        if name.strip() not in (*VICTIMS, *BYSTANDERS) or not 0 < found[name.strip()] < float("inf"):
            raise argparse.ArgumentTypeError(f"{item!r}: of {', '.join((*VICTIMS, *BYSTANDERS))}, with shares above 0")
    return found


async def _all_loads(a: argparse.Namespace, server: OwnServer) -> tuple[list[Load], bool]:
    """The load without deaths, then those with; and whether it was interrupted."""
    interrupted = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, interrupted.set)
    asker = Asker(server.url, server.model.text, server.operator)
    arrivals = poisson(None, QUESTIONS, a.prompts, a.answers, a.seed)
    questions = [
        Question.of(server.model.manifest.name, arrival, chat=i % 2 == 0, whole=i % 4 != 3)
        for i, arrival in enumerate(arrivals)
    ]
    known = [await asker.learn(question, a.deadline) for question in questions]
    reaper = Reaper(server, a.kill, signal.Signals[a.signal], a.stopped, a.seed, a.in_turn)
    loads = []
    minutes = a.minutes * len(a.every) if len(a.minutes) == 1 else a.minutes
    lengths_s: list[tuple[float | None, float]] = [(None, a.undisturbed)]
    lengths_s += [(every_s, 60 * each) for every_s, each in zip(a.every, minutes, strict=True)]
    for every_s, seconds in lengths_s:
        if interrupted.is_set():
            break
        print("no deaths" if every_s is None else f"a death every {every_s:g} s", f"for {seconds:g} s", flush=True)
        loads.append(await _load(a, asker, known, reaper, Load(every_s), seconds, interrupted))
    return loads, interrupted.is_set()


async def _load(
    a: argparse.Namespace,
    asker: Asker,
    known: Sequence[Known],
    reaper: Reaper,
    load: Load,
    seconds: float,
    interrupted: asyncio.Event,
) -> Load:
    stop, health = asyncio.Event(), Health()
    load.began_s = time.perf_counter()

    async def client(i: int) -> None:
        draw = random.Random(f"{a.seed}/{load.every_s}/{i}")
        while not stop.is_set():
            item = draw.choice(known)
            reply, nonce = await asker.ask(item.question, a.deadline)
            judged = asker.judge(item, reply, nonce)
            for _ in range(a.retries):
                if judged.verdict != "failed":
                    break
                load.retried += 1
                reply, nonce = await asker.ask(item.question, a.deadline, nonce=nonce)
                judged = asker.judge(item, reply, nonce)
            load.answers.append((item, reply, judged))
            if judged.verdict in ("failed", "refused"):
                await asyncio.sleep(AGAIN_S)

    watch = asyncio.create_task(health.watch(asker.url))
    clients = [asyncio.create_task(client(i)) for i in range(a.clients)]
    deaths = [] if load.every_s is None else [asyncio.create_task(reaper.reap(load.every_s, stop, load.deaths))]
    try:
        await asyncio.wait_for(interrupted.wait(), seconds)
    except TimeoutError:
        pass
    stop.set()
    await asyncio.gather(*clients, *deaths)  # every client's answer ends within its deadline
    load.ended_s = time.perf_counter()
    await asyncio.sleep(NOTICED_S)
    while health.changes and not health.changes[-1][1] and time.perf_counter() < load.ended_s + SETTLE_S:
        await asyncio.sleep(AGAIN_S)
    watch.cancel()
    health.mark(load.deaths)
    return load


def settle_margins(model: PublishedModel, loads: Sequence[Load], exact_margin: float) -> None:
    """Every parted answer whose tokens transformers' own logits cannot tell apart stays so; others are wrong."""
    if not any(judged.verdict == "parted" for load in loads for _, _, judged in load.answers):
        return
    import torch

    from benchmarks.parity import reference_model

    reference = reference_model(model.checkpoint, torch.float32)

    def settled(known: Known, judged: Judged) -> Judged:
        if judged.parting is None:
            return judged
        place = judged.parting
        if place >= min(len(judged.out_ids), len(known.out_ids)):
            return replace(judged, verdict="wrong", why=f"{len(judged.out_ids)} of {len(known.out_ids)} tokens")
        with torch.inference_mode():
            ids = torch.tensor([[*known.prompt_ids, *known.out_ids[:place]]])
            best = reference(ids).logits[0, -1].float().topk(2)
        margin, pair = float(best.values[0] - best.values[1]), set(best.indices.tolist())
        near = margin <= exact_margin and {judged.out_ids[place], known.out_ids[place]} == pair
        why = f"token {place}: margin {margin:.1e}"
        return replace(judged, verdict="parted" if near else "wrong", why=why)

    for load in loads:
        load.answers = [(known, reply, settled(known, judged)) for known, reply, judged in load.answers]


def summary(load: Load) -> dict[str, Any]:
    """Figures of one load."""
    count = Counter(judged.verdict for _, _, judged in load.answers)
    right = [(reply, judged) for _, reply, judged in load.answers if judged.verdict in ("correct", "parted")]
    seconds = load.ended_s - load.began_s
    stalled = {i: stalls([reply for _, reply, _ in load.answers], load.deaths, i) for i in range(len(load.deaths))}
    by_part: dict[str, list[float]] = {}
    for i, death in enumerate(load.deaths):
        by_part.setdefault(death.victim, []).extend(stalled[i])
    why = Counter(judged.why[:150] for _, _, judged in load.answers if judged.verdict in ("failed", "refused"))
    wrong = [judged.why for _, _, judged in load.answers if judged.verdict == "wrong"]
    died = [death for death in load.deaths if not death.missed]
    return {
        "every_s": load.every_s,
        "seconds": round(seconds, 1),
        "died": len(died),
        "requests": len(load.answers),
        **{verdict: count[verdict] for verdict in ("correct", "parted", "wrong", "failed", "refused")},
        "right_percent": round(100 * len(right) / max(1, len(load.answers)), 2),
        "right_of_begun_percent": round(100 * len(right) / max(1, len(load.answers) - count["refused"]), 2),
        "retried": load.retried,
        "again": sum((judged.attempt or 0) > 0 for _, judged in right),
        "goodput_tokens_per_s": round(sum(len(judged.out_ids) for _, judged in right) / seconds, 2),
        "stall_s": percentiles([s for of in stalled.values() for s in of], 2),
        "stall_s_by_part": {part: percentiles(of, 2) for part, of in sorted(by_part.items())},
        "ready_s": percentiles([d.ready_after_s for d in died if d.ready_after_s is not None], 2),
        "back_s": percentiles([d.back_after_s for d in died if d.back_after_s is not None], 2),
        "first_wrong": wrong[0] if wrong else None,
        "partings": [judged.why for _, judged in right if judged.verdict == "parted"],
        "errors": dict(why.most_common(8)),
        "deaths": [
            asdict(death) | {"at_s": round(death.at_s - load.began_s, 1), "stalls_s": stalled[i]}
            for i, death in enumerate(load.deaths)
        ],
    }


def stalls(replies: Sequence[Reply], deaths: Sequence[Death], i: int) -> list[float]:
    """The stall of every stream that was talking at death i and ended well, in seconds."""
    at = deaths[i].at_s
    end = deaths[i + 1].at_s if i + 1 < len(deaths) else float("inf")
    found = []
    for reply in replies:
        if reply.error is not None or not reply.piece_s or not reply.piece_s[0] <= at < reply.ended_s:
            continue
        gaps = [(a, b) for a, b in pairwise((*reply.piece_s, reply.ended_s))]
        over = [min(b, end) - a for a, b in gaps if b > at and a < end]  # what is left of it is the next death's
        found.append(round(max(0.0, max(over) - statistics.median(b - a for a, b in gaps)), 3))
    return found


def table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs in plain lines."""
    lines = [
        "every s  died  requests  correct  parted  wrong  failed  refused  right %  again  stall s p50/p99  ready s"
        " p50/p99  goodput tokens/s (of undisturbed)"
    ]
    for run in runs:
        every = "-" if run["every_s"] is None else f"{run['every_s']:g}"
        counts = [run[name] for name in ("died", "requests", "correct", "parted", "wrong", "failed", "refused")]
        widths = (4, 8, 7, 6, 5, 6, 7)
        cells = [f"{every:>7}", *(f"{n:>{w}}" for n, w in zip(counts, widths, strict=True))]
        cells += [f"{run['right_percent']:>7}", f"{run['again']:>5}"]
        for name, width in (("stall_s", 15), ("ready_s", 15)):
            spread = run[name]
            cells.append(f"{'-' if spread is None else '{p50} / {p99}'.format(**spread):>{width}}")
        cells.append(f"{run['goodput_tokens_per_s']:>8} ({run['goodput_percent']} %)")
        lines.append("  ".join(cells))
    return lines


def _ours(server: OwnServer) -> dict[str, int]:
    """How many of our processes and of this machine's shared segments there are."""
    return {name.removeprefix("ray::"): len(server.processes(name)) for name in OURS} | {"segments": len(segments())}


if __name__ == "__main__":
    sys.exit(main())
