"""The HAProxy switch: five times the requests/s, but it listens everywhere, so it asks for a key."""

from __future__ import annotations

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
    cluster.interrupt()
    assert eventually(lambda: cluster.left_behind() == ({}, set()), 30), cluster.left_behind()
