"""The application under `llmd serve`, which is `serve run` behind a check: real Ray, real HTTP, a tiny model."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import check
from shard_tools.signing import read_public_key
from tests.e2e.cluster import NAME, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def all_pages(cluster: Cluster) -> int:
    """Pages of the idle pipeline. The state is a second old, hence: once it says that nothing runs."""

    def idle() -> bool:
        pipeline = cluster.state()["pipelines"][0]
        return pipeline["running"] == pipeline["steps_in_flight"] == 0

    cluster.wait_until_ready()
    assert eventually(idle, 30)
    pages: int = cluster.state()["pipelines"][0]["free_pages"]
    return pages


@pytest.fixture
def client(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def body(**fields: object) -> dict[str, object]:
    return {"model": NAME, "messages": MESSAGES, "temperature": 0, **fields}


def test_an_answer_comes_with_a_receipt_that_verifies(cluster: Cluster) -> None:
    """The receipt names this request's tokens and both stages, and rests on the operator's key alone."""
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body(max_tokens=8), timeout=60).json()
    receipt = answer["llmd"]["receipt"]
    bundle = Bundle.decode(base64.urlsafe_b64decode(receipt + "=" * (-len(receipt) % 4)))
    operator = read_public_key(cluster.root / "state" / "operator.pub")
    checked = check(bundle, operator, now_s=int(time.time()))
    assert answer["usage"]["completion_tokens"] == len(checked.receipt.out_ids)
    assert len(checked.statements) == 2


def test_stages_hold_their_own_layers_only(cluster: Cluster) -> None:
    """Two actors, each with half of the layers, hash every row that was run."""
    assert eventually(lambda: len(cluster.state()["pipelines"][0]["stages"]) == 2, 10)
    stages = cluster.state()["pipelines"][0]["stages"]
    assert [stage["layers"] for stage in stages] == [[0, 2], [2, 4]]
    assert all({"steps", "took_us", "usual_us"} == stage["pace"].keys() and "crawls" in stage for stage in stages)
    assert len(cluster.processes("ray::_StageProcess")) == 2


def test_sixteen_streams_of_unequal_length_all_finish(client: OpenAI) -> None:
    """Requests join and leave between steps; each gets all of its tokens."""

    def stream(i: int) -> int:
        chunks = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "x" * i}],  # type: ignore[list-item]
            max_tokens=5 + i,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"seed": i},
        )
        usages = [chunk.usage for chunk in chunks if chunk.usage]
        return usages[-1].completion_tokens

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(stream, range(1, 17)))
    assert all(1 <= n <= 5 + i for i, n in enumerate(counts, start=1))


def test_a_seeded_answer_repeats(client: OpenAI) -> None:
    """Same seed, same tokens."""

    def once() -> str | None:
        answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12, seed=7)  # type: ignore[arg-type]
        return answer.choices[0].message.content

    assert once() == once()


def test_clients_that_hang_up_give_their_pages_back(cluster: Cluster, all_pages: int) -> None:
    """Cancelled requests leave nothing: seen to hold pages, then every page of the pipeline is free again."""
    with contextlib.ExitStack() as streams:
        lines = []  # kept: an iterator that nobody holds closes its connection
        for _ in range(4):
            url, request = f"{cluster.url}/v1/chat/completions", body(max_tokens=450, stream=True)
            lines.append(streams.enter_context(httpx.stream("POST", url, json=request, timeout=60)).iter_lines())
            next(lines[-1])
        assert eventually(lambda: cluster.state()["pipelines"][0]["free_pages"] < all_pages, 20, every_s=0.05)
    assert eventually(lambda: cluster.state()["pipelines"][0]["free_pages"] == all_pages, 20)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, None),
        (json.dumps(body(model="nobody")).encode(), 404, "model_not_found"),
        (json.dumps(body(messages=[{"role": "user", "content": "x" * 4000}])).encode(), 400, "context_length_exceeded"),
    ],
)
def test_bad_requests_are_refused_with_an_openai_error(
    cluster: Cluster, content: bytes, status: int, code: str
) -> None:
    answer = httpx.post(
        f"{cluster.url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert (status, code) == (answer.status_code, answer.json()["error"]["code"])


def test_an_ingress_that_is_killed_does_not_take_the_pipeline_along(cluster: Cluster, client: OpenAI) -> None:
    """It holds no state: another one finds the same stages, loaded as they are."""
    epoch, stages = cluster.state()["pipelines"][0]["epoch"], cluster.processes("ray::_StageProcess")
    (ingress,) = cluster.processes("ray::ServeReplica:llmd:ingress")
    os.kill(ingress, signal.SIGKILL)
    assert eventually(lambda: not cluster.processes("ray::ServeReplica:llmd:ingress").keys() & {ingress}, 10)
    cluster.wait_until_ready()
    assert cluster.state()["pipelines"][0]["epoch"] == epoch
    assert cluster.processes("ray::_StageProcess") == stages
    assert client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=4).choices  # type: ignore[arg-type]


def test_a_stage_that_is_killed_costs_its_requests_a_pause(cluster: Cluster, client: OpenAI) -> None:
    """The same response goes on with the same text, and its receipt tells of the attempt; the other stage stays."""
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 200, "temperature": 0, "stream": True}
    undisturbed = _text(client.chat.completions.create(**asked))
    epoch, before = cluster.state()["pipelines"][0]["epoch"], cluster.processes("ray::_StageProcess")
    chunks = client.chat.completions.create(**asked)
    began = [next(chunks) for _ in range(10)]
    killed = next(iter(before))
    os.kill(killed, signal.SIGKILL)
    assert _text(itertools.chain(began, chunks)) == undisturbed

    def repaired() -> bool:
        """Told once a second; a new epoch begins a moment before its Head resumes."""
        pipeline = cluster.state()["pipelines"][0]
        return bool(pipeline["epoch"] > epoch and pipeline["resumed"] == 1 and pipeline["failure"] is None)

    assert eventually(repaired, 30), cluster.state()["pipelines"][0]
    assert cluster.processes("ray::_StageProcess").keys() & before.keys() == before.keys() - {killed}


def _text(chunks: Iterable[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_ctrl_c_leaves_no_process_and_no_shared_memory(cluster: Cluster) -> None:
    """Runs last: the server of this module is gone after it."""
    cluster.interrupt()
    assert eventually(lambda: cluster.left_behind() == ({}, set()), 30), cluster.left_behind()
