"""A node dies and none comes in its place: those that are left hold its layers too, until there is another one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.http_client import Reply
from benchmarks.known_answers import Asker, Question
from benchmarks.server import OwnServer
from benchmarks.workload import Arrival
from tests.e2e.cluster import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ANSWER_S = 150.0


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with OwnServer("tiny", 2, nodes=2, kv_memory_bytes=16 << 20, stages_at_least=1, beside_s=5.0) as server:
        yield server
        print(server.log.read_text(errors="replace")[-8000:])  # shown with a failure


def stages(server: OwnServer) -> int:
    try:
        return len(server.state()["stages"]) if server.ready() else 0
    except LookupError:
        return 0


def test_a_pipeline_goes_on_with_the_nodes_there_are(server: OwnServer) -> None:
    asker = Asker(server.url, server.model.text, server.operator)
    question = Question.of(server.model.manifest.name, Arrival(0, "river stone cloud", 900), True, whole=True)
    # Its raylet: the parent of every worker of a node.
    raylet = int(Path(f"/proc/{server.parts().one('stage', 1).pid}/stat").read_text().rpartition(")")[2].split()[1])
    killed: list[int] = []

    def heard(reply: Reply) -> None:
        if len(reply.piece_s) >= 20 and not killed:
            os.kill(raylet, signal.SIGKILL)
            killed.append(raylet)

    async def over_the_death_of_a_node() -> None:
        known = await asker.learn(question, ANSWER_S)
        reply, nonce = await asker.ask(question, ANSWER_S, heard)
        judged = asker.judge(known, reply, nonce)
        assert judged.verdict == "correct", judged.why

    asyncio.run(over_the_death_of_a_node())
    assert eventually(lambda: stages(server) == 1, 60)
    server.start_node()
    assert eventually(lambda: stages(server) == 2, 120)
