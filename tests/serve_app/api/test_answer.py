"""One request as text, without HTTP around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve_app.api.answer import Answer
from serve_app.api.echo import EchoGenerator
from serve_app.errors import PipelineError
from serve_app.messages.request import Event, FinishedEvent, GenerationRequest, RequestId, Sampling, fresh_salt
from tests.serve_app.api.bytes_text import END, BytesText
from tests.serve_app.api.echo_server import MODEL


def request(prompt: str) -> GenerationRequest:
    ids = (*prompt.encode(), END)
    return GenerationRequest(RequestId("r-1"), MODEL.manifest, ids, 9999, Sampling(), (END,), b"", fresh_salt())


def answer_of(generator: EchoGenerator, prompt: str = "x" * 5000) -> Answer:
    return Answer(generator, request(prompt), BytesText().decoder(), ())


def test_a_request_runs_to_its_end_while_nobody_reads_and_the_text_waits_in_one_piece() -> None:
    async def run() -> None:
        echo = EchoGenerator()
        answer = answer_of(echo)
        await answer.start()
        async with asyncio.timeout(10):
            while not echo.served:
                await asyncio.sleep(0)
        assert echo.status()["running"] == 0
        assert [piece async for piece in answer.pieces()] == ["x" * 5000]
        assert (answer.end.reason, answer.end.completion_tokens) == ("stop", 5001)
        await answer.close()

    asyncio.run(run())


def test_closing_an_answer_early_frees_the_request_before_close_returns() -> None:
    async def run() -> None:
        echo = EchoGenerator(pace_s=0.001)
        answer = answer_of(echo)
        await answer.start()
        await answer.close()
        assert (echo.cancelled, echo.status()["running"]) == (1, 0)

    asyncio.run(run())


class Ending(EchoGenerator):
    """Ends a request at once, with whatever it is given."""

    def __init__(self, *events: Event) -> None:
        super().__init__()
        self._events = events

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        for event in self._events:
            yield event


@pytest.mark.parametrize("events", [(), (FinishedEvent(RequestId("r-1"), "cancelled", b""),)])
def test_an_answer_without_a_proper_end_is_an_error(events: tuple[Event, ...]) -> None:
    async def run() -> None:
        answer = answer_of(Ending(*events))
        await answer.start()
        async for _ in answer.pieces():
            pass

    with pytest.raises(PipelineError):
        asyncio.run(run())


def test_an_answer_of_no_tokens_is_empty_and_whole() -> None:
    async def run() -> str:
        answer = answer_of(Ending(FinishedEvent(RequestId("r-1"), "length", b"r")))
        await answer.start()
        text = "".join([piece async for piece in answer.pieces()])
        assert (answer.end.completion_tokens, answer.end.receipt) == (0, b"r")
        return text

    assert asyncio.run(run()) == ""
