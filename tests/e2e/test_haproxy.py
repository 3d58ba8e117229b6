"""The HAProxy switch: five times the requests/s, but it listens everywhere, so it asks for a key."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import NAME, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
KEY = "a-key-of-this-test"


def through_haproxy(document: dict[str, Any]) -> None:
    document["applications"][0]["args"]["ingress"]["proxy"] = "haproxy"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(through_haproxy)
    try:
        yield cluster
    finally:
        cluster.close()


def test_haproxy_without_a_key_is_refused_before_anything_starts(cluster: Cluster) -> None:
    """One line says what to set."""
    refused = cluster.run("llmd", "serve", str(cluster.config), "--new-ray")
    assert refused.returncode == 2
    assert "ingress.api_keys" in refused.stderr
    assert not cluster.processes()


def signal_all(pids: list[int], number: int) -> None:
    """To those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stopped_in_the_middle(cluster: Cluster, url: str, body: dict[str, Any]) -> None:
    """HAProxy stands still for two seconds while an answer comes: that goes on where it was, to its end."""
    with httpx.stream("POST", url, json=body, timeout=60, headers={"authorization": f"Bearer {KEY}"}) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(10)]
        # Read now: a proxy that Serve has told of new routes hands over to a process that it starts, and ends.
        proxies = list(cluster.processes("haproxy"))
        signal_all(proxies, signal.SIGSTOP)
        try:
            time.sleep(2)
        finally:
            signal_all(proxies, signal.SIGCONT)
        seen += list(lines)
    assert "data: [DONE]" in seen and any('"receipt"' in line for line in seen), seen[-3:]


def test_haproxy_serves_whoever_shows_the_key_and_nobody_else(cluster: Cluster) -> None:
    """The same application behind the other proxy; Ctrl-C removes that too."""
    keys = cluster.root / "keys"
    keys.write_text(KEY + "\n")
    text = cluster.config.read_text()
    assert "api_keys: null" in text
    cluster.config.write_text(text.replace("api_keys: null", f"api_keys: {{file: {keys}}}"))
    cluster.environment.pop("RAY_SERVE_ENABLE_HA_PROXY")  # the switch in the config is to be enough
    cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
    cluster.wait_until_ready()
    assert cluster.processes("haproxy")
    body = {"model": NAME, "prompt": "a", "max_tokens": 3}
    url = f"{cluster.url}/v1/completions"
    assert httpx.post(url, json=body, timeout=60).status_code == 401
    answer = httpx.post(url, json=body, timeout=60, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.json()["llmd"]["receipt"]
    stopped_in_the_middle(cluster, url, {**body, "max_tokens": 400, "stream": True})
    cluster.interrupt()
    assert eventually(lambda: cluster.left_behind() == ({}, set()), 30), cluster.left_behind()
