"""The load client reads what servers send, however it is cut, and says what went wrong; figures are what they say."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from benchmarks import client_overhead, http_client
from benchmarks.http_client import Reply
from benchmarks.serving import receipts_rows, summary
from benchmarks.spread import percentile, percentiles, slope
from benchmarks.workload import lengths, poisson

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENTS = b"".join(
    b"data: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": "Héllo"}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": " you"}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "llmd": {"receipt": "abc"}},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
)
DONE = b"data: [DONE]\n\n"


def asked(answer: bytes, **options: object) -> Reply:
    """What the client makes of a server that sends these bytes and closes."""

    async def run() -> Reply:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        reply = await http_client.ask(url, "/v1/chat/completions", {}, timeout_s=5, **options)  # type: ignore[arg-type]
        server.close()
        return reply

    return asyncio.run(run())


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_is_read_however_it_is_cut(size: int) -> None:
    reply = asked(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS + DONE, size))
    assert reply.error is None
    assert (reply.text, len(reply.piece_s), reply.finish, reply.receipt) == ("Héllo you", 2, "stop", "abc")
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 2)
    assert reply.sent_s <= reply.piece_s[0] <= reply.piece_s[1] <= reply.ended_s


def test_servers_that_do_not_chunk_or_end_lines_otherwise_are_read_too() -> None:
    assert asked(HEAD + b"\r\n" + (EVENTS + DONE).replace(b"\n", b"\r\n")).text == "Héllo you"


def test_the_client_can_hang_up() -> None:
    reply = asked(HEAD + b"\r\n" + EVENTS, hang_up_after=1)
    assert reply.hung_up and reply.error is None and len(reply.piece_s) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "IncompleteReadError"),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nfull", "status 429: full"),
        (HEAD + b"\r\n" + EVENTS, "without [DONE]"),
        (HEAD + b"\r\n" + b'data: {"error": "gone"}\n\n', "gone"),
        (HEAD + b"\r\n" + b"data: {{{\n\n", "JSONDecodeError"),
        (HEAD + b"\r\n" + b"data: [1]\n\n", "BadReplyError"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", "ValueError"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n", "a chunk of"),
    ],
)
def test_what_went_wrong_is_said(answer: bytes, says: str) -> None:
    assert says in str(asked(answer).error)


def test_nobody_listening_is_an_error_not_an_exception() -> None:
    reply = asyncio.run(http_client.ask("http://127.0.0.1:1", "/", {}))
    assert "ConnectionRefusedError" in str(reply.error)


def test_the_clients_own_cost_is_measured() -> None:
    figures = client_overhead.measured(4, 50.0, 10)
    assert figures["age_ms"]["p50"] < 100 and figures["client_cpu_us_per_event"] < 10_000


def test_figures_are_what_their_names_say() -> None:
    """Two answers: first text after 1 and 3 s, then 2 tokens in 1 s and 4 in 0.6 s; only the first keeps 2 s, 1 s."""
    first = Reply(0.0, 200, [1.0, 2.0], "ab", prompt_tokens=5, completion_tokens=2, ended_s=2.0)
    second = Reply(1.0, 200, [4.0, 4.3, 4.6], "abcd", prompt_tokens=5, completion_tokens=4, ended_s=5.0)
    failed = Reply(1.0, error="gone", ended_s=1.5)
    figures = summary([first, second, failed], (2000, 1000))
    assert (figures["requests"], figures["errors"], figures["seconds"]) == (3, 1, 5.0)
    assert figures["answer_tokens_per_s"] == 1.2 and figures["goodput_per_s"] == 0.2
    assert figures["ttft_ms"]["p50"] == 2000 and figures["tpot_ms"] == {"p50": 600.0, "p90": 920.0, "p99": 992.0}
    assert figures["itl_ms"]["p50"] == 300
    assert receipts_rows([first], None)[1]  # no receipt came


def test_the_load_is_the_same_for_every_server_and_rate() -> None:
    slow, fast = poisson(0.5, 50, "8-80", "4", 7), poisson(5.0, 50, "8-80", "4", 7)
    assert [a.prompt for a in slow] == [a.prompt for a in fast]
    assert slow[-1].at_s == pytest.approx(10 * fast[-1].at_s)
    assert 50 < slow[-1].at_s < 200 and {a.at_s for a in poisson(None, 9, "1", "1", 0)} == {0.0}
    draw = random.Random(0)
    assert {lengths("3-5")(draw) for _ in range(99)} == {3, 4, 5}
    assert max(lengths("60~0.8<90")(draw) for _ in range(99)) == 90
    with pytest.raises(ValueError):
        lengths("5-3")


def test_percentiles_and_slope() -> None:
    assert percentile([3, 1, 2], 50) == 2 and percentile([1, 2], 75) == 1.75 and percentile([4], 99) == 4
    assert percentiles([]) is None
    assert slope([0, 1, 2], [1, 3, 5]) == 2 and slope([1], [1]) == 0
