"""Part k dies at token t, for every k and a grid of t; then parts at random, many in a row. What is the answer worth?

    python -m benchmarks.kills [--model tiny] [--stages 2] [--spares 0] [--grid 1 2 17 60] [--random 50] [--streams 1]

Each round asks greedily, in float32, kills a part of the running application when the first stream has heard t pieces,
and compares every answer with the undisturbed one: tokens, text, end, and a receipt that verifies, in the same HTTP
response. Where tokens differ, transformers' margin between its two best decides, as in benchmarks/churn.py.

stall: the longest silence of a stream, from the kill on. Its parts: noticed, from the kill to the Supervisor's first
act; load, until every stage holds its layers; join, until the new epoch goes on; refill, until the next token. Before a
round everything is there again. It fails if an answer is not right, or if anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.churn import Load, settle_margins
from benchmarks.http_client import Reply
from benchmarks.known_answers import Asker, Known, Question
from benchmarks.report import Result, save
from benchmarks.server import OwnServer
from benchmarks.spread import percentiles
from benchmarks.workload import poisson
from tests.e2e.cluster import eventually
from tests.e2e.parts import Kind, Part

BACK_S = 120.0  # until everything is there again, after the answers have ended
LATEST_PIECE = 0.8  # of an answer's tokens: a part is not killed later than that
_REPAIRED = re.compile(r"noticed at ([\d.]+), ([\d.]+) s to load, ([\d.]+) s to join")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclass(slots=True)
class Round:
    """One kill and what was heard of it; seconds, or None where it is not known."""

    victim: str
    piece: int
    verdicts: list[str] = field(default_factory=list)
    stall_s: float | None = None
    noticed_s: float | None = None
    load_s: float | None = None
    join_s: float | None = None
    refill_s: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="tiny")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--spares", type=int, default=0)
    parser.add_argument("--grid", type=int, nargs="*", default=[1, 2, 17, 60], help="pieces heard when a part dies")
    parser.add_argument("--random", type=int, default=50, help="rounds with a part and a piece drawn at random")
    parser.add_argument("--streams", type=int, default=1, help="requests at once; they begin one after another")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds a client waits for a whole answer")
    parser.add_argument("--exact-margin", type=float, default=1e-4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: every stage on the one GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where: dict[str, Any] = {"device": a.device, "dtype": "float32"}
    if a.device == "cuda":
        where["gpus_per_stage"] = 1 / (a.stages + a.spares + 1)  # while one is replaced, another may be there already
    server = OwnServer(a.model, a.stages, kv_memory_bytes=64 << 20, spares=a.spares, **where)
    with server:
        rounds, answers, held = asyncio.run(_all_rounds(a, server))
        settle_margins(server.model, [answers], a.exact_margin)
    verdicts = [judged.verdict for _, _, judged in answers.answers]
    problems = [f"left behind: {what}" for what in server.left]
    bad = [j for _, _, j in answers.answers if j.verdict not in ("correct", "parted")]
    problems += [f"an answer is {judged.verdict}: {judged.why}" for judged in bad[:5]]
    figures = {
        "model": a.model,
        "device": a.device,
        "stages": a.stages,
        "spares": a.spares,
        "streams": a.streams,
        "answer_tokens": a.tokens,
        "rounds": len(rounds),
        "answers": len(verdicts),
        **{verdict: verdicts.count(verdict) for verdict in ("correct", "parted", "wrong", "failed", "refused")},
        "by_part": {name: _figures([r for r in rounds if r.victim == name]) for name in _names(rounds)},
        "all": _figures(rounds),
        "held": held,
        "problems": problems,
        "slowest": [asdict(r) for r in sorted(rounds, key=lambda r: r.stall_s or 0.0)[-3:]],
    }
    save(Result("kills", figures), a.out)
    print("\n".join(table(rounds)))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(bool(problems))


async def _all_rounds(a: argparse.Namespace, server: OwnServer) -> tuple[list[Round], Load, dict[str, Any]]:
    asker = Asker(server.url, server.model.text, server.operator)
    arrivals = poisson(None, a.streams, "8-40", str(a.tokens), a.seed)
    questions = [
        Question.of(server.model.manifest.name, x, chat=i % 2 == 0, whole=True) for i, x in enumerate(arrivals)
    ]
    known = [await asker.learn(question, a.deadline) for question in questions]
    draw = random.Random(f"{a.seed}/kills")
    parts: list[tuple[Kind, int]] = [("stage", i) for i in range(a.stages)] + [("head", 0)]
    plan = [(part, piece) for part in parts for piece in a.grid]
    latest = max(1, int(a.tokens * LATEST_PIECE))
    plan += [(draw.choice([*parts, ("supervisor", 0)]), draw.randint(1, latest)) for _ in range(a.random)]
    rounds, answers = [], Load(None)
    held: dict[str, Any] = {}
    for n, ((kind, index), piece) in enumerate(plan):
        victim = await asyncio.to_thread(_when_whole, server, a.stages, a.spares, kind, index)
        if n == 0:
            held["before"] = _held(server)
        began = len(server.log.read_text(errors="replace"))
        one = Round(str(victim), piece)
        await _round(a, asker, known, victim, one, answers)
        _split(one, server.log.read_text(errors="replace")[began:])
        rounds.append(one)
        print(f"  {n + 1}/{len(plan)} {one.victim} at {piece}: {', '.join(one.verdicts)}, {_line(one)}", flush=True)
        if set(one.verdicts) - {"correct", "parted"}:
            print(_COLOURS.sub("", server.log.read_text(errors="replace"))[-6000:], flush=True)
    await asyncio.to_thread(_when_whole, server, a.stages, a.spares, "head", 0)
    held["after"] = _held(server)
    return rounds, answers, held


def _when_whole(server: OwnServer, stages: int, spares: int, kind: Kind, index: int) -> Part:
    """This part, once all are there and the application is ready. Raises RuntimeError if that takes too long."""
    wanted = {f"stage {i}" for i in range(stages)} | {"head", "supervisor"}
    found: list[Part] = []

    def whole() -> bool:
        try:
            alive = server.parts().alive()
            found[:] = [part for part in alive if (part.kind, part.index) == (kind, index)]
            names = [str(part) for part in alive]
            return wanted <= set(names) and _waiting(server) >= spares and server.ready() and bool(found)
        except LookupError:
            return False

    if not eventually(whole, BACK_S, every_s=0.2):
        raise RuntimeError(f"not whole again after {BACK_S:.0f} s:\n{server.log.read_text(errors='replace')[-6000:]}")
    return found[-1]


def _waiting(server: OwnServer) -> int:
    """Stage processes beyond those that are stages."""
    return len(server.processes("ray::_StageProcess")) - len(server.state()["stages"])


async def _round(
    a: argparse.Namespace, asker: Asker, known: Sequence[Known], victim: Part, one: Round, answers: Load
) -> None:
    killed_s: list[float] = []

    def heard(reply: Reply) -> None:
        if len(reply.piece_s) >= one.piece and not killed_s:
            killed_s.append(time.perf_counter())
            victim.hear(signal.SIGKILL)
            one.noticed_s = time.time()  # of the kill, until `_split`

    async def ask(i: int, item: Known) -> Reply:
        await asyncio.sleep(0.05 * i)
        reply, nonce = await asker.ask(item.question, a.deadline, heard if i == 0 else lambda reply: None)
        judged = asker.judge(item, reply, nonce)
        answers.answers.append((item, reply, judged))
        one.verdicts.append(judged.verdict)
        return reply

    replies = await asyncio.gather(*(ask(i, item) for i, item in enumerate(known)))
    if killed_s:
        after = [[t for t in (*r.piece_s, r.ended_s) if t >= killed_s[0]] for r in replies if r.ended_s > killed_s[0]]
        gaps = [max(b - a for a, b in pairwise((killed_s[0], *times))) for times in after]
        one.stall_s = round(max(gaps, default=0.0), 3)


def _split(one: Round, log: str) -> None:
    """Where the time went, from the Supervisor's own words; nothing if it was the one that died."""
    killed_at, one.noticed_s = one.noticed_s, None
    said = _REPAIRED.findall(log)
    if killed_at is None or one.stall_s is None or not said:
        return
    noticed_at, load_s, join_s = (float(x) for x in said[0])
    one.noticed_s, one.load_s, one.join_s = round(max(0.0, noticed_at - killed_at), 2), load_s, join_s
    one.refill_s = round(max(0.0, one.stall_s - one.noticed_s - load_s - join_s), 2)


def _held(server: OwnServer) -> dict[str, dict[str, int]]:
    """Memory and descriptors of the processes that live through everything."""
    found = {}
    for name in ("ray::_SupervisorProcess", "ray::ServeReplica", "ray::_HeadProcess"):
        for pid in server.processes(name):
            rows = Path(f"/proc/{pid}/status").read_text().splitlines()
            kib = next(int(row.split()[1]) for row in rows if row.startswith("VmRSS"))
            found[name.removeprefix("ray::")] = {"mb": kib >> 10, "fds": len(os.listdir(f"/proc/{pid}/fd"))}
    return found


def _names(rounds: Sequence[Round]) -> list[str]:
    return sorted({one.victim for one in rounds})


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    parts = ("stall_s", "noticed_s", "load_s", "join_s", "refill_s")
    return {"rounds": len(rounds)} | {
        name: percentiles([value for one in rounds if (value := getattr(one, name)) is not None], 2) for name in parts
    }


def _line(one: Round) -> str:
    if one.noticed_s is None:
        return f"stall {one.stall_s} s"
    parts = f"{one.noticed_s} noticed + {one.load_s} load + {one.join_s} join + {one.refill_s} refill"
    return f"stall {one.stall_s} s = {parts}"


def table(rounds: Sequence[Round]) -> list[str]:
    """Parts that died, in plain lines."""
    lines = ["part         rounds  right  stall s p50/p99  noticed p50/p99  load p50/p99  join p50/p99  refill p50/p99"]
    for name in [*_names(rounds), "all"]:
        mine = [one for one in rounds if name in (one.victim, "all")]
        right = sum(set(one.verdicts) <= {"correct", "parted"} for one in mine)
        figures = _figures(mine)
        cells = [f"{name:<12}", f"{len(mine):>6}", f"{right:>5}"]
        for part, width in (("stall_s", 15), ("noticed_s", 15), ("load_s", 12), ("join_s", 12), ("refill_s", 14)):
            spread = figures[part]
            cells.append(f"{'-' if spread is None else '{p50} / {p99}'.format(**spread):>{width}}")
        lines.append("  ".join(cells))
    return lines


if __name__ == "__main__":
    sys.exit(main())
