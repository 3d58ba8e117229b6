"""Two pipelines of one model: one is added while the other serves, either may die, and the last is drained away."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml

from benchmarks import http_client
from benchmarks.http_client import Reply
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import check
from shard_tools.signing import read_public_key
from tests.e2e.cluster import NAME, Cluster, eventually, free_port
from tests.e2e.parts import Part, Parts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
BODY = {"model": NAME, "prompt": "river stone", "max_tokens": 300, "temperature": 0, "logit_bias": {"2": -100}}


class Application:
    """One, on a Ray that runs already, and how many pipelines it is to have."""

    def __init__(self) -> None:
        def small(document: dict[str, Any]) -> None:
            document["applications"][0]["args"]["pipeline"] |= {"stages": 1, "threads_per_stage": 1}
            document["applications"][0]["args"]["ingress"]["drain_s"] = 10.0
            document["applications"][0]["args"]["audit"] |= {"on_request": True, "retain_bytes": 32 << 20}

        self.cluster = Cluster(small)
        port = free_port()
        ports = (f"--port={free_port()}", f"--dashboard-port={port}")
        started = self.cluster.run("ray", "start", "--head", "--num-cpus=4", "--disable-usage-stats", *ports)
        assert started.returncode == 0, started.stderr
        self._dashboard = f"http://127.0.0.1:{port}"
        self._parts = Parts(self._dashboard, self.cluster.root / "token", self.cluster.url)

    def deploy(self, replicas: int) -> None:
        document = yaml.safe_load(self.cluster.config.read_text())
        document["applications"][0]["args"]["pipeline"]["replicas"] = replicas
        self.cluster.config.write_text(yaml.safe_dump(document))
        deployed = self.cluster.run("serve", "deploy", str(self.cluster.config), "-a", self._dashboard)
        assert deployed.returncode == 0, deployed.stderr

    def pipelines(self) -> list[dict[str, Any]]:
        try:
            state: list[dict[str, Any]] = self.cluster.state().get("pipelines", [])
        except httpx.HTTPError:
            return []
        return state

    def has(self, replicas: int) -> bool:
        found = self.pipelines()
        return len(found) == replicas and all(p["ready"] and "epoch" in p and not p["waits_for"] for p in found)

    def drawn(self) -> list[int]:
        """Tokens that each pipeline has drawn, as it said within the last second."""
        return [pipeline["tokens_drawn"] for pipeline in self.pipelines()]

    def processes(self, replica: int) -> list[Part]:
        return [p for p in self._parts.alive() if p.kind in ("head", "stage") and p.replica == replica]


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    application = Application()
    try:
        application.deploy(1)
        application.cluster.wait_until_ready()
        yield application
    finally:
        application.cluster.close()


def with_two(application: Application) -> Application:
    if not application.has(2):
        application.deploy(2)
        assert eventually(lambda: application.has(2), 90), application.pipelines()
    return application


def test_a_second_pipeline_is_added_and_the_first_one_is_not_touched(application: Application) -> None:
    before = {part.pid for part in application.processes(0)}
    assert len(before) == 2
    with_two(application)
    assert {part.pid for part in application.processes(0)} == before
    assert len(application.processes(1)) == 2


def test_what_begins_alike_goes_to_one_pipeline_and_new_beginnings_to_both(application: Application) -> None:
    with_two(application)
    sizes, homes = [], set()
    for word in ("river ", "stone ", "light ", "water "):
        before = application.drawn()
        for more in ("", "tree", "tree river"):
            body = {**BODY, "prompt": word * 40 + more, "max_tokens": 10}
            answer = httpx.post(f"{application.cluster.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            sizes.append(answer.json()["usage"]["prompt_tokens"])
        assert eventually(lambda before=before: sum(application.drawn()) == sum(before) + 30, 20)  # type: ignore
        homes.add(tuple(n > was for n, was in zip(application.drawn(), before, strict=True)))
    assert min(sizes) > 64
    assert homes == {(True, False), (False, True)}


def test_answers_of_either_pipeline_are_audited_where_that_was_asked_for(application: Application) -> None:
    """One auditor hears both. Nothing was calibrated, so that is what its verdicts say: they are verdicts."""
    with_two(application)
    url, before = application.cluster.url, application.drawn()

    def ask(i: int) -> httpx.Response:
        body = {**BODY, "prompt": f"{i} stone", "max_tokens": 40, "seed": i}
        headers = {"X-LLMD-Assurance": "audited"}
        until = time.monotonic() + 60
        while True:  # 429 while an auditor, or room for rows, is on its way
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            if answer.status_code != 429 or time.monotonic() > until:
                return answer
            time.sleep(0.5)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8, [answer.text for answer in answers]
    assert eventually(lambda: all(now > was for now, was in zip(application.drawn(), before, strict=True)), 20)
    for answer in answers:
        looked = f"{url}/v1/receipts/{answer.json()['id']}"

        def judged(looked: str = looked) -> bool:
            said = httpx.get(looked, timeout=10)
            return said.status_code == 200 and said.json()["audit"]["verdict"] is not None

        assert eventually(judged, 60), httpx.get(looked, timeout=10).text
        found = httpx.get(looked, timeout=10).json()
        assert found["assurance"] == "audited" and found["audit"]["verdict"]["finding"] == "uncalibrated"


@pytest.mark.parametrize("what", ["head", "whole"])
def test_one_pipeline_dies_in_the_middle_and_every_stream_comes_to_its_right_end(
    application: Application, what: str
) -> None:
    """What ran on it goes on; nothing is sent there until it is back, and the other one serves all the while."""
    with_two(application)
    expected = httpx.post(f"{application.cluster.url}/v1/completions", json=BODY, timeout=60).json()
    text = expected["choices"][0]["text"]
    doomed = [part for part in application.processes(1) if what == "whole" or part.kind == "head"]

    async def course() -> list[Reply]:
        talking = asyncio.Event()
        replies: dict[int, Reply] = {}

        def heard(reply: Reply) -> None:
            replies[id(reply)] = reply
            if sum(len(reply.piece_s) > 2 for reply in replies.values()) == 6:
                talking.set()

        async def ask() -> Reply:
            body = {**BODY, "stream": True}
            return await http_client.ask(application.cluster.url, "/v1/completions", body, heard=heard, timeout_s=60)

        streams = [asyncio.create_task(ask()) for _ in range(6)]
        async with asyncio.timeout(60):
            await talking.wait()
        for part in doomed:
            os.kill(part.pid, signal.SIGKILL)
        later = [asyncio.create_task(ask()) for _ in range(2)]
        return list(await asyncio.gather(*streams, *later))

    replies = asyncio.run(course())
    assert [reply.error for reply in replies if reply.error] == []
    assert {reply.text for reply in replies} == {text}
    operator = read_public_key(application.cluster.root / "state" / "operator.pub")
    attempts = set()
    for reply in replies:
        data = base64.urlsafe_b64decode((reply.receipt or "") + "==")
        attempts.add(check(Bundle.decode(data), operator, now_s=int(time.time())).receipt.attempt)
    assert max(attempts) >= 1024, "no stream was on the pipeline that died"
    assert eventually(lambda: application.has(2), 90), application.pipelines()


def test_with_fewer_pipelines_the_last_one_is_drained_and_goes(application: Application) -> None:
    with_two(application)
    kept = {part.pid for part in application.processes(0)}

    async def course() -> Reply:
        stream = asyncio.create_task(
            http_client.ask(application.cluster.url, "/v1/completions", {**BODY, "stream": True}, timeout_s=60)
        )
        await asyncio.to_thread(application.deploy, 1)
        return await stream

    reply = asyncio.run(course())
    assert reply.error is None and reply.receipt
    assert eventually(lambda: application.has(1) and not application.processes(1), 90), application.pipelines()
    assert {part.pid for part in application.processes(0)} == kept
