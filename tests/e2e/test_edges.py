"""A whole application whose stages are joined by other edges than those of one host: TLS, and Ray's own calls."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.e2e.cluster import NAME, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def serving(edges: str, deliveries: str = "auto") -> Cluster:
    def choose(document: dict[str, Any]) -> None:
        args = document["applications"][0]["args"]
        args["pipeline"]["edges"] = edges
        args.setdefault("audit", {})["deliveries"] = deliveries

    cluster = Cluster(choose)
    cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
    return cluster


def test_over_tls_a_stopped_stage_is_replaced_and_the_stream_goes_on() -> None:
    """A stage that is stopped (SIGSTOP) holds its connections open and says nothing: only heartbeats tell."""
    cluster = serving("tcp")
    try:
        cluster.wait_until_ready()
        request = {"model": NAME, "prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{cluster.url}/v1/completions", json=request, timeout=60).json()["llmd"]["receipt"]
        client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 400, "temperature": 0, "stream": True}
        undisturbed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked) if chunk.choices)
        chunks = client.completions.create(**asked)
        text = next(chunks).choices[0].text
        stopped = min(cluster.processes("ray::_StageProcess"))
        os.kill(stopped, signal.SIGSTOP)
        text += "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == undisturbed
        assert eventually(lambda: stopped not in cluster.processes(), 30)
    finally:
        cluster.close()


def test_over_rays_own_calls_it_answers_too() -> None:
    """The fallback, and the reference; with signatures for rows on their way, which a cluster makes if told to."""
    cluster = serving("ray", "always")
    try:
        cluster.wait_until_ready()
        request = {"model": NAME, "prompt": "a", "max_tokens": 8}
        assert httpx.post(f"{cluster.url}/v1/completions", json=request, timeout=60).json()["llmd"]["receipt"]

        def checked() -> int:
            stages = cluster.state()["pipelines"][0]["stages"]  # none yet, for a moment
            return sum(stage.get("deliveries_checked", 0) for stage in stages)

        assert eventually(lambda: checked() >= 8, 20)
    finally:
        cluster.close()
