"""How much faster are 16 streams side by side than one after another? Through HTTP, by the official client.

    python -m benchmarks.concurrency [--url http://127.0.0.1:8000] [--requests 16]

Requests of unequal length (prompts of 30 to 120 tokens, answers of 24 to 84) against a server that runs already.
Every stage must have hashed every row that was run, or the figures do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from benchmarks.report import Result, save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    figures = asyncio.run(measure(a.url, a.requests))
    time.sleep(2.5)  # the state is a second old, and so is what it is made of
    pipeline = httpx.get(f"{a.url}/v1/cluster/state", timeout=5).json()["pipelines"][0]
    hashed = [stage["rows_hashed"] for stage in pipeline["stages"]]
    figures |= {"rows_run": pipeline["rows_run"], "rows_hashed": hashed, "stages": len(hashed)}
    save(Result("concurrency", figures), a.out)
    if any(rows != pipeline["rows_run"] for rows in hashed):
        print("not every row was hashed: these figures do not count", file=sys.stderr)
        return 1
    return 0


async def measure(url: str, n: int) -> dict[str, Any]:
    """Tokens per second side by side and one after another; one warm-up before."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = (await client.models.list()).data[0].id
    await stream(client, model, 0)
    began = time.perf_counter()
    together = await asyncio.gather(*(stream(client, model, i) for i in range(n)))
    together_s = time.perf_counter() - began
    began = time.perf_counter()
    alone = [await stream(client, model, i) for i in range(n)]
    alone_s = time.perf_counter() - began
    rates = sum(together) / together_s, sum(alone) / alone_s
    return {
        "requests": n,
        "tokens_together": sum(together),
        "tokens_alone": sum(alone),
        "together_tokens_per_s": round(rates[0], 2),
        "alone_tokens_per_s": round(rates[1], 2),
        "ratio": round(rates[0] / rates[1], 2),
    }


async def stream(client: AsyncOpenAI, model: str, i: int) -> int:
    """One greedy streaming chat; its completion tokens."""
    chunks = await client.chat.completions.create(
        model=model,
        messages=[
            {"role": "user", "content": f"Write a long story about number {i} and a {'very ' * (3 * i)}old cat."}
        ],
        max_tokens=24 + 4 * i,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    tokens = 0
    async for chunk in chunks:
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return tokens


if __name__ == "__main__":
    sys.exit(main())
