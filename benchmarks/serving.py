"""How does it serve under load? Open-loop arrivals through the real HTTP endpoint, receipts on.

    python -m benchmarks.serving [--rates 0.5 1 2 inf] [--requests 20]        starts `llmd serve` itself
    python -m benchmarks.serving --url http://127.0.0.1:8001 --model NAME        any OpenAI-compatible server
    python -m benchmarks.serving --peer transformers                             its generate_batch, beside ours

Requests arrive as a Poisson process that does not wait for answers (`inf`: all at once); the same requests at every
rate, drawn from a seed. Streamed greedy chats by benchmarks/http_client.py, whose own cost is measured first and
reported, as is how late it sent. A server of ours must give every answer a receipt that verifies, and its stages must
have hashed exactly the rows that the receipts speak of; then, and if no request failed, the figures count.

TTFT: from sending to the first text. TPOT: from the first text to the last, per token after the first. ITL: between two
pieces of text. Goodput: requests a second whose TTFT and TPOT both keep within the bounds of --slo.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx

from benchmarks import client_overhead, http_client
from benchmarks.counters import rows_problem
from benchmarks.http_client import Reply
from benchmarks.report import Result, save
from benchmarks.server import OwnServer, pipeline_state
from benchmarks.spread import percentiles
from benchmarks.workload import Arrival, lengths, poisson
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import check
from shard_tools.errors import LlmdError
from shard_tools.signing import PublicKey, read_public_key

STATE_AGE_S = 2.5  # the state is a second old, and so is what it is made of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=None, help="a server that runs already; default: one of our own")
    parser.add_argument("--model", default=None, help="as the server names it; default: its first")
    parser.add_argument("--own-model", choices=["smollm2", "tiny"], default="smollm2", help="of our own server")
    parser.add_argument("--trust", type=Path, default=None, help="with --url: operator.pub of a server of ours")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, math.inf], help="requests a second")
    parser.add_argument("--requests", type=int, default=20, help="at each rate")
    parser.add_argument("--prompts", type=lengths_text, default="8-80", help="words: 64, 20-200 or 60~0.8<400")
    parser.add_argument("--answers", type=lengths_text, default="8-32", help="tokens at most, in the same forms")
    parser.add_argument("--slo", type=float, nargs=2, default=[2000.0, 250.0], metavar=("TTFT_MS", "TPOT_MS"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=["transformers"], default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    figures: dict[str, Any] = {"server": a.url or "llmd serve", "prompt_words": a.prompts, "answer_tokens": a.answers}
    figures |= {"slo_ttft_ms": a.slo[0], "slo_tpot_ms": a.slo[1], "client": client_overhead.measured(16, 20.0, 40)}
    with nullcontext() if a.url else OwnServer(a.own_model, a.stages) as own:
        url = a.url or own.url
        key = own.operator if own else read_public_key(a.trust) if a.trust else None
        headers = {"Authorization": f"Bearer {a.api_key}"} if a.api_key else {}
        name = a.model or httpx.get(f"{url}/v1/models", headers=headers, timeout=10).json()["data"][0]["id"]
        figures |= {"model": name, "stages": a.stages if own else None}
        asyncio.run(_warm_up(url, name, headers))
        time.sleep(STATE_AGE_S)  # or its rows would be counted with the first load's
        runs, problems = [], []
        for rate in a.rates:
            arrivals = poisson(None if math.isinf(rate) else rate, a.requests, a.prompts, a.answers, a.seed)
            run, wrong = measure(url, name, headers, arrivals, a.slo, key)
            runs.append({"asked_per_s": "all at once" if math.isinf(rate) else rate, **run})
            problems += wrong
            print(runs[-1], flush=True)
        figures["runs"] = runs
    if a.peer:
        from benchmarks.transformers_peer import generate_batch

        arrivals = poisson(None, a.requests, a.prompts, a.answers, a.seed)
        figures["transformers_generate_batch"] = generate_batch(a.own_model, arrivals)
    save(Result("serving", figures | {"problems": problems}), a.out)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return int(bool(problems))


def lengths_text(text: str) -> str:
    """A distribution's text, checked."""
    lengths(text)
    return text


async def _warm_up(url: str, model: str, headers: Mapping[str, str]) -> None:
    reply = await http_client.ask(url, "/v1/chat/completions", _body(model, Arrival(0, "Hello", 4)), headers=headers)
    if reply.error:
        raise SystemExit(f"{url} does not answer: {reply.error}")


def measure(
    url: str,
    model: str,
    headers: Mapping[str, str],
    arrivals: Sequence[Arrival],
    slo: Sequence[float],
    key: PublicKey | None,
) -> tuple[dict[str, Any], list[str]]:
    """Figures of one load, and what keeps them from counting."""
    try:
        before: dict[str, Any] | None = pipeline_state(url)
    except LookupError:
        before = None  # a peer: no receipts to ask for
    replies, client = asyncio.run(_load(url, model, headers, arrivals))
    figures = summary(replies, slo) | client
    problems = [f"a request failed: {reply.error}" for reply in replies if reply.error][:3]
    if before is not None:
        time.sleep(STATE_AGE_S)
        rows, wrong = receipts_rows(replies, key)
        problems += wrong
        after = pipeline_state(url)
        stages = list(zip(before["stages"], after["stages"], strict=True))
        hashed = [b["rows_hashed"] - a["rows_hashed"] for a, b in stages]
        says = all("rows_reused" in stage for stage in after["stages"])
        reused = [b["rows_reused"] - a["rows_reused"] for a, b in stages] if says else None
        figures |= {"receipts": len([r for r in replies if r.receipt]), "rows_hashed": hashed}
        figures["rows_run"] = after["rows_run"] - before["rows_run"]
        wrong_rows = rows_problem(before, after, hashed, rows, reused=reused)
        problems += [wrong_rows] if wrong_rows else []
    return figures, problems


async def _load(
    url: str, model: str, headers: Mapping[str, str], arrivals: Sequence[Arrival]
) -> tuple[list[Reply], dict[str, Any]]:
    """The replies, in order of asking, and what the client did meanwhile."""
    began, cpu = time.perf_counter(), time.process_time()
    late: list[float] = []

    async def one(arrival: Arrival) -> Reply:
        await asyncio.sleep(max(0.0, began + arrival.at_s - time.perf_counter()))
        late.append((time.perf_counter() - began - arrival.at_s) * 1e3)
        return await http_client.ask(url, "/v1/chat/completions", _body(model, arrival), headers=headers)

    replies = await asyncio.gather(*(one(arrival) for arrival in arrivals))
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    return replies, {"sent_late_ms": percentiles(late, 2), "client_cpu_percent": round(100 * share, 2)}


def _body(model: str, arrival: Arrival) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": arrival.prompt}],
        "max_tokens": arrival.answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def summary(replies: Sequence[Reply], slo: Sequence[float]) -> dict[str, Any]:
    """What clients saw."""
    good = [r for r in replies if r.error is None and r.piece_s]
    tokens = [r.completion_tokens or len(r.piece_s) for r in good]
    ttft = [(r.piece_s[0] - r.sent_s) * 1e3 for r in good]
    tpot = [(r.piece_s[-1] - r.piece_s[0]) * 1e3 / max(1, n - 1) for r, n in zip(good, tokens, strict=True)]
    gaps = [(b - a) * 1e3 for r in good for a, b in zip(r.piece_s, r.piece_s[1:], strict=False)]
    took = max(r.ended_s for r in replies) - min(r.sent_s for r in replies)
    kept = sum(first <= slo[0] and each <= slo[1] for first, each in zip(ttft, tpot, strict=True))
    return {
        "requests": len(replies),
        "errors": sum(r.error is not None for r in replies),
        "seconds": round(took, 2),
        "prompt_tokens": sum(r.prompt_tokens or 0 for r in good),
        "answer_tokens": sum(tokens),
        "answer_tokens_per_s": round(sum(tokens) / took, 2),
        "goodput_per_s": round(kept / took, 3),
        "within_slo_percent": round(100 * kept / len(replies), 1),
        "ttft_ms": percentiles(ttft),
        "tpot_ms": percentiles(tpot),
        "itl_ms": percentiles(gaps),
        "end_to_end_ms": percentiles([(r.ended_s - r.sent_s) * 1e3 for r in good]),
    }


def receipts_rows(replies: Sequence[Reply], key: PublicKey | None) -> tuple[int, list[str]]:
    """Rows that the receipts speak of, and what is wrong with a receipt. key None: whoever signed the registry."""
    rows, problems = 0, []
    for reply in replies:
        if reply.error is not None:
            continue
        try:
            bundle = Bundle.from_text(reply.receipt or "")
            checked = check(bundle, key or bundle.registry.key, now_s=int(time.time()))
        except LlmdError as e:
            problems.append(f"a receipt is missing or does not verify: {e}")
            continue
        rows += checked.statements[0].n_rows
        if len(checked.receipt.out_ids) != reply.completion_tokens:
            problems.append(
                f"a receipt speaks of {len(checked.receipt.out_ids)} tokens, {reply.completion_tokens} came"
            )
    return rows, problems[:3]


if __name__ == "__main__":
    sys.exit(main())
