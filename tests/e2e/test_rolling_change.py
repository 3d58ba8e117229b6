"""A new version of the model, then of the code, under load: no request fails, and no answer mixes two versions."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import serve_app
import shard_tools
from benchmarks import http_client
from benchmarks.http_client import Reply
from shard_tools.index.directory import DirectoryIndex
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.directory import DirectoryStore
from tests.e2e.cluster import NAME, Cluster, free_port
from tests.tiny_models import write_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CLIENTS, ANSWER_S, CHANGE_S = 3, 60.0, 120.0
BODY = {"model": NAME, "prompt": "river stone", "max_tokens": 120, "temperature": 0, "logit_bias": {"2": -100}}


@pytest.fixture
def signer() -> Signer:
    return Signer.fresh()


@pytest.fixture
def cluster(signer: Signer) -> Iterator[Cluster]:
    def two_doors(document: dict[str, Any]) -> None:
        document["applications"][0]["args"]["ingress"]["replicas"] = 2
        document["applications"][0]["args"]["pipeline"] |= {"stages": 2, "threads_per_stage": 1}

    cluster = Cluster(two_doors)
    release(cluster, signer, seed=1)
    try:
        yield cluster
    finally:
        cluster.close()


def release(cluster: Cluster, signer: Signer, seed: int) -> str:
    """Publish other weights under the same name; the CID of the manifest."""
    checkpoint = write_tiny_checkpoint(cluster.root / f"checkpoint-{seed}", layers=4, seed=seed)
    store = cluster.root / "store"
    published = publish(checkpoint, DirectoryStore(store), DirectoryIndex(store), NAME, signer)
    (cluster.root / "publisher.pub").write_text(key_text(signer.public) + "\n")
    return str(published.manifest)


@asynccontextmanager
async def load(url: str) -> AsyncIterator[list[Reply]]:
    """Streams that follow one another, CLIENTS at a time, while the body runs."""
    replies: list[Reply] = []
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            replies.append(await http_client.ask(url, "/v1/completions", {**BODY, "stream": True}, timeout_s=ANSWER_S))

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    try:
        yield replies
    finally:
        stop.set()
        await asyncio.gather(*clients)


def test_model_and_code_change_under_load_and_no_request_fails(
    cluster: Cluster, signer: Signer, tmp_path: Path
) -> None:
    dashboard = free_port()
    ports = (f"--port={free_port()}", f"--dashboard-port={dashboard}")
    assert cluster.run("ray", "start", "--head", "--num-cpus=8", "--disable-usage-stats", *ports).returncode == 0

    def deploy(change: dict[str, Any] | None = None) -> None:
        document = yaml.safe_load(cluster.config.read_text())
        application = document["applications"][0]
        if change is not None:
            application["args"]["model"] |= change.get("model", {})
            application |= {k: v for k, v in change.items() if k != "model"}
        cluster.config.write_text(yaml.safe_dump(document))
        deployed = cluster.run("serve", "deploy", str(cluster.config), "-a", f"http://127.0.0.1:{dashboard}")
        assert deployed.returncode == 0, deployed.stderr

    def text() -> str:
        answer = httpx.post(f"{cluster.url}/v1/completions", json=BODY, timeout=ANSWER_S)
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""

    async def change_to(replies: list[Reply], begun: int, done: Any) -> None:
        async with asyncio.timeout(CHANGE_S):
            while not await asyncio.to_thread(done) or len(replies) < begun + 2 * CLIENTS:
                await asyncio.sleep(0.5)

    async def course() -> tuple[list[Reply], str, str]:
        first = await asyncio.to_thread(text)
        async with load(cluster.url) as replies:
            await change_to(replies, 0, lambda: True)
            second = release(cluster, signer, seed=2)
            assert await asyncio.to_thread(text) == first, "a release was served before the configuration asked for it"
            begun = len(replies)
            await asyncio.to_thread(deploy, {"model": {"manifest": second}})
            await change_to(replies, begun, lambda: versions(cluster) == 1 and text() != first)
            last = await asyncio.to_thread(text)
            groups, begun = pipelines(cluster), len(replies)
            await asyncio.to_thread(deploy, {"runtime_env": {"env_vars": {"PYTHONPATH": str(other_code(tmp_path))}}})
            await change_to(replies, begun, lambda: versions(cluster) == 1 and not pipelines(cluster) & groups)
        return replies, first, last

    deploy()
    cluster.wait_until_ready()
    replies, first, last = asyncio.run(course())
    assert [reply.error for reply in replies if reply.error] == []
    texts = [reply.text for reply in replies]
    assert set(texts) == {first, last} and first != last, "an answer is of neither version"
    assert texts[0] == first and texts[-1] == last
    assert all(reply.receipt for reply in replies)


def other_code(folder: Path) -> Path:
    """A copy of the two packages that differs from them."""
    for package in (serve_app, shard_tools):
        root = Path(package.__file__ or "").parent
        shutil.copytree(root, folder / root.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    changed = folder / "serve_app" / "cluster" / "version.py"
    changed.write_text(changed.read_text() + "\n# a later version of the code\n")
    return folder


def versions(cluster: Cluster) -> int:
    """How many Supervisors there are: one for each version."""
    return len(cluster.processes("ray::_SupervisorProcess"))


def pipelines(cluster: Cluster) -> set[int]:
    """Processes of Heads."""
    return set(cluster.processes("ray::_HeadProcess"))
