"""A node dies and none comes in its place: those that are left hold its layers too, until there is another one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.known_answers import Asker, Question
from benchmarks.server import OwnServer
from benchmarks.workload import Arrival
from tests.e2e.cluster import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ANSWER_S = 100.0


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
    question = Question.of(server.model.manifest.name, Arrival(0, "river stone cloud", 600), True, whole=True)

    async def over_the_death_of_a_node() -> None:
        known = await asker.learn(question, ANSWER_S)
        answer = asyncio.create_task(asker.ask(question, ANSWER_S))
        victim = await asyncio.to_thread(server.parts().one, "stage", 1)
        fields = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()
        os.kill(int(fields[1]), signal.SIGKILL)  # its raylet: the parent of every worker of the node
        reply, nonce = await answer
        judged = asker.judge(known, reply, nonce)
        assert judged.verdict == "correct", judged.why

    asyncio.run(over_the_death_of_a_node())
    assert stages(server) == 1
    server.start_node()
    assert eventually(lambda: stages(server) == 2, 120)
