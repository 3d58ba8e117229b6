"""An application whose nodes hold nothing: names come over HTTP, and each stage's blocks from a node of the cluster.

Once it serves, that node may hang: what a stage needs to be replaced lies in the cache.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from shard_tools.block_server import BlockServer
from shard_tools.cluster_key import create_key, load_key
from shard_tools.index.directory import DirectoryIndex
from shard_tools.store.directory import DirectoryStore
from tests.e2e.cluster import NAME, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_a_model_is_served_from_blocks_that_are_fetched_when_they_are_needed(tmp_path: Path) -> None:
    """And the newest release that was seen is noted."""
    key, cache, servers = tmp_path / "cluster.key", tmp_path / "cache", list[BlockServer]()
    create_key(key)

    def elsewhere(document: dict[str, Any]) -> None:
        model = document["applications"][0]["args"]["model"]
        published = Path(model["store"])
        servers.append(
            BlockServer(DirectoryStore(published), "127.0.0.1", 0, load_key(key), names=DirectoryIndex(published))
        )
        url = f"http://127.0.0.1:{servers[0].port}"
        model["store"] = {"kind": "peers", "cache": str(cache), "addresses": url, "cluster_key": str(key)}
        model["index"] = {"kind": "http", "url": url, "cluster_key": str(key)}

    cluster = Cluster(elsewhere)
    try:
        cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
        cluster.wait_until_ready()
        request = {"model": NAME, "prompt": "a", "max_tokens": 5}
        assert httpx.post(f"{cluster.url}/v1/completions", json=request, timeout=60).json()["llmd"]["receipt"]
        assert len(list(DirectoryStore(cache).cids())) > 30
        assert (cluster.root / "state" / "seen" / NAME).exists()
        port = servers[0].port
        servers.pop().close()
        with socket.create_server(
            ("127.0.0.1", port)
        ):  # it takes connections and never answers, as one that is stopped
            before = cluster.processes("ray::_StageProcess")
            os.kill(next(iter(before)), signal.SIGKILL)
            assert eventually(lambda: len(cluster.processes("ray::_StageProcess").keys() - before.keys()) == 1, 30)
            again = httpx.post(f"{cluster.url}/v1/completions", json=request, timeout=60)
            assert again.status_code == 200 and again.json()["llmd"]["receipt"], again.text
    finally:
        cluster.close()
        for server in servers:
            server.close()
