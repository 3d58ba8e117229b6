"""More clients than there is room for, and a door that dies: the others are served as if nothing were."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks import http_client
from benchmarks.http_client import Reply
from benchmarks.known_answers import Asker, Question
from benchmarks.server import OwnServer
from benchmarks.workload import Arrival
from serve_app.client import fresh_nonce
from tests.e2e.cluster import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

RUNNING, WAITING = 4, 2
ANSWER_S = 60.0
TRIES = 5  # Serve draws the door of each request: sometimes all go to one


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    limits = {"max_requests": RUNNING, "max_waiting": WAITING, "kv_memory_bytes": 16 << 20}
    with OwnServer("tiny", 2, ingress={"replicas": 2}, **limits) as server:
        yield server


@pytest.fixture
def asker(server: OwnServer) -> Asker:
    return Asker(server.url, server.model.text, server.operator)


def question(server: OwnServer, tokens: int) -> Question:
    return Question.of(server.model.manifest.name, Arrival(0, "music doctor ocean", tokens), chat=True, whole=True)


def test_what_there_is_no_room_for_is_told_to_come_again(server: OwnServer) -> None:
    """Of many requests at once some are answered; every other gets 429 with the seconds to wait, and soon."""
    asked = question(server, 200)

    async def everybody() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S) as client:
            return await asyncio.gather(*(client.post(asked.path, json=asked.body) for _ in range(24)))

    answers = asyncio.run(everybody())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= RUNNING + WAITING
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused)


def test_a_request_whose_time_is_over_ends_in_the_queue_and_while_it_draws(server: OwnServer) -> None:
    """504 at its deadline, and nothing of it runs on."""
    asked = question(server, 1000)

    async def everybody() -> list[tuple[httpx.Response, float]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S) as client:

            async def one(timeout_s: float) -> tuple[httpx.Response, float]:
                began = time.perf_counter()
                answer = await client.post(asked.path, json=asked.body | {"timeout": timeout_s})
                return answer, time.perf_counter() - began

            return await asyncio.gather(*(one(1.0) for _ in range(RUNNING)), *(one(0.5) for _ in range(WAITING)))

    for answer, took_s in asyncio.run(everybody()):
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert took_s < 2.5
    assert eventually(lambda: server.state()["running"] == server.state()["waiting"] == 0, 5)


def test_streams_of_the_other_door_do_not_notice_that_one_dies(server: OwnServer, asker: Asker) -> None:
    """Those of the killed door see their connection end within a second; the pipeline stays as it is."""
    epoch = server.state()["epoch"]

    async def over_a_death() -> set[str]:
        known = await asker.learn(question(server, 1000), ANSWER_S)
        streams = [asyncio.create_task(asker.ask(known.question, ANSWER_S)) for _ in range(RUNNING)]
        door = await asyncio.to_thread(server.parts().one, "ingress")
        while server.state()["running"] < RUNNING:
            await asyncio.sleep(0.05)
        assert door.hear(signal.SIGKILL)
        killed_s = time.perf_counter()
        verdicts = set()
        for reply, nonce in await asyncio.gather(*streams):
            judged = asker.judge(known, reply, nonce)
            verdicts.add(judged.verdict)
            assert judged.verdict == "correct" or reply.ended_s - killed_s < 1.0
        again, nonce = await asker.ask(known.question, ANSWER_S)
        assert asker.judge(known, again, nonce).verdict == "correct"
        return verdicts

    seen: set[str] = set()
    for _ in range(TRIES):
        assert eventually(lambda: doors(server) == 2, 60)
        seen = asyncio.run(over_a_death())
        if len(seen) == 2:
            break
    assert seen == {"correct", "failed"}, "both doors never had streams"
    assert server.state()["epoch"] == epoch


def test_a_retry_under_its_key_goes_on_where_the_killed_door_left_it(server: OwnServer, asker: Asker) -> None:
    """The undisturbed text, a receipt that verifies, and every token drawn once."""
    tokens, epoch = 1000, server.state()["epoch"]
    known = asyncio.run(asker.learn(question(server, tokens), ANSWER_S))

    async def over_a_death() -> int:
        asked = [{**known.question.body, "stream": True, "llmd": fresh_nonce()} for _ in range(RUNNING)]
        asked = [body | {"stream_options": {"include_usage": True}} for body in asked]

        async def ask(i: int) -> Reply:
            key = {"Idempotency-Key": asked[i]["llmd"]["nonce"]}
            return await http_client.ask(
                server.url, known.question.path, asked[i], headers=key, heard=heard.append, timeout_s=ANSWER_S
            )

        heard: list[Reply] = []
        first = [asyncio.create_task(ask(i)) for i in range(RUNNING)]
        door = await asyncio.to_thread(server.parts().one, "ingress")
        while len({id(reply) for reply in heard}) < RUNNING:
            await asyncio.sleep(0.02)
        assert door.hear(signal.SIGKILL)
        broken = [i for i, reply in enumerate(await asyncio.gather(*first)) if reply.error is not None]
        for i in broken:
            again = await ask(i)
            judged = asker.judge(known, again, asked[i]["llmd"]["nonce"])
            assert judged.verdict == "correct" and judged.attempt == 0, judged
        return len(broken)

    broken = 0
    for _ in range(TRIES):
        assert eventually(lambda: doors(server) == 2, 60)
        drawn = drawn_when_idle(server)
        broken = asyncio.run(over_a_death())
        assert drawn_when_idle(server) - drawn == RUNNING * tokens
        if broken:
            break
    assert broken, "no stream ever went through the door that died"
    assert server.state()["epoch"] == epoch


def doors(server: OwnServer) -> int:
    """How many there are now."""
    return sum(part.kind == "ingress" for part in server.parts().alive())


def drawn_when_idle(server: OwnServer) -> int:
    """Tokens drawn by the Head so far. What it says of itself is a second old at most."""
    seen = [-1]

    def idle() -> bool:
        state = server.state()
        seen.append(state["tokens_drawn"])
        return seen[-1] == seen[-2] and state["running"] == 0

    assert eventually(idle, 30, every_s=1.5)
    return seen[-1]


def test_a_door_that_is_stopped_is_replaced_and_what_was_sent_to_it_is_answered(server: OwnServer) -> None:
    """Serve sends it to the other one, once three health checks in a row have had no answer."""
    assert eventually(lambda: doors(server) == 2, 60)
    asked = question(server, 5)

    async def over_a_stop() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S) as client:
            door = await asyncio.to_thread(server.parts().one, "ingress")
            assert door.hear(signal.SIGSTOP)

            async def ask() -> tuple[int, float]:
                began = time.monotonic()
                answer = await client.post(asked.path, json=asked.body)
                while (
                    answer.status_code == 429 and time.monotonic() - began < ANSWER_S
                ):  # as any client of OpenAI's does
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                    answer = await client.post(asked.path, json=asked.body)
                return answer.status_code, time.monotonic() - began

            sent = []
            for _ in range(40):  # over the 9 s and more
                sent.append(asyncio.create_task(ask()))
                await asyncio.sleep(0.5)
            return await asyncio.gather(*sent)

    answers = asyncio.run(over_a_stop())
    assert {status for status, _ in answers} == {200}
    assert max(seconds for _, seconds in answers) < 30
