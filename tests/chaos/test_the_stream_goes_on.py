"""A part of the pipeline dies in the middle of an answer: the client sees a pause and nothing else.

Real Ray, real HTTP, a tiny model, the real process killed. `python -m benchmarks.churn` is the long form.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Iterator

import pytest

from benchmarks.http_client import Reply
from benchmarks.known_answers import Asker, Known, Question
from benchmarks.server import OwnServer
from benchmarks.workload import Arrival
from tests.e2e.cluster import eventually
from tests.e2e.parts import Kind, Part

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

LONG, SHORT = 900, 400  # tokens: two seconds and one, undisturbed
STALL_S = 15.0  # without a warm spare, as promised for a model of 135 million weights
ANSWER_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with OwnServer("tiny", 2, kv_memory_bytes=16 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def asker(server: OwnServer) -> Asker:
    return Asker(server.url, server.model.text, server.operator)


@pytest.fixture(scope="module")
def answers(server: OwnServer, asker: Asker) -> tuple[Known, Known]:
    """A long and a short one, while nothing disturbs."""

    def learned(words: str, tokens: int, chat: bool) -> Known:
        question = Question.of(server.model.manifest.name, Arrival(0, words, tokens), chat, whole=True)
        return asyncio.run(asker.learn(question, ANSWER_S))

    return learned("river stone cloud", LONG, True), learned("paper garden winter", SHORT, False)


@pytest.fixture
def whole(server: OwnServer) -> Iterator[None]:
    """Every part is there and answers: what a test before this one killed has come back."""

    def back() -> bool:
        try:
            return {str(part) for part in server.parts().alive()} >= {"stage 0", "stage 1", "head"} and server.ready()
        except LookupError:
            return False

    come_back = eventually(back, 60)
    if come_back:
        yield
    print(server.log.read_text(errors="replace")[-8000:] if server.root.exists() else "")  # shown with a failure
    assert come_back, "the application did not come back after the death before this test"


async def heard_through(asker: Asker, known: Known, victim: Part, at: int, what: signal.Signals) -> Reply:
    """The one answer over the death of a part at its piece number `at`, judged."""
    done: list[bool] = []

    def heard(reply: Reply) -> None:
        if len(reply.piece_s) >= at and not done:
            done.append(victim.hear(what))

    reply, nonce = await asker.ask(known.question, ANSWER_S, heard)
    assert done == [True], f"{victim} was not killed: the answer had {len(reply.piece_s)} pieces; {reply.error}"
    require_whole(asker, known, reply, nonce)
    return reply


def require_whole(asker: Asker, known: Known, reply: Reply, nonce: str) -> None:
    """The same response went on to the end: text, tokens and receipt of the undisturbed answer, after a short pause."""
    judged = asker.judge(known, reply, nonce)
    assert judged.verdict == "correct", f"after {len(reply.piece_s)} pieces of text: {judged.verdict}, {judged.why}"
    stall = max(b - a for a, b in itertools.pairwise((reply.sent_s, *reply.piece_s)))
    assert stall <= STALL_S, f"the stream stood still for {stall:.1f} s"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(("kind", "index", "at"), [("stage", 0, 1), ("head", 0, 30)], ids=["stage", "head"])
def test_a_killed_part_is_a_pause(
    server: OwnServer, asker: Asker, answers: tuple[Known, Known], kind: Kind, index: int, at: int
) -> None:
    """Stage 0 at the first token, the Head at the thirtieth."""
    asyncio.run(heard_through(asker, answers[0], server.parts().one(kind, index), at, signal.SIGKILL))


@pytest.mark.usefixtures("whole")
def test_two_requests_live_through_the_death_of_the_last_stage(
    server: OwnServer, asker: Asker, answers: tuple[Known, Known]
) -> None:
    """One is near its end, the other at its beginning: neither is lost, and neither takes the other's tokens."""
    long, short = answers
    victim = server.parts().one("stage", 1)

    async def both() -> None:
        tasks: list[asyncio.Task[Reply]] = []

        def heard(reply: Reply) -> None:
            if len(reply.piece_s) >= LONG * 2 // 3 and not tasks:
                tasks.append(asyncio.create_task(heard_through(asker, short, victim, 20, signal.SIGKILL)))

        reply, nonce = await asker.ask(long.question, ANSWER_S, heard)
        assert tasks, f"the long answer had {len(reply.piece_s)} pieces; {reply.error}"
        await tasks[0]
        require_whole(asker, long, reply, nonce)

    asyncio.run(both())


@pytest.mark.usefixtures("whole")
def test_a_stage_that_hangs_is_a_pause(server: OwnServer, asker: Asker, answers: tuple[Known, Known]) -> None:
    """It is stopped, not dead: no connection breaks, and still somebody notices. When it wakes it disturbs nobody."""
    victim = server.parts().one("stage", 1)
    try:
        asyncio.run(heard_through(asker, answers[1], victim, 40, signal.SIGSTOP))
    finally:
        victim.hear(signal.SIGCONT)


@pytest.mark.usefixtures("whole")
def test_after_all_this_nothing_is_left(server: OwnServer) -> None:
    """Runs last: no process, no shared memory, no temporary file of the application."""
    server.stop()
    assert server.left == []
