"""The two endpoints, seen through the official client."""

from __future__ import annotations

import base64
import concurrent.futures
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from serve_app.api.echo import EchoGenerator
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from tests.serve_app.api.echo_server import MODEL, Serve, Server, eventually
from tests.serve_app.api.stop_definition import whole

SAYING = "Grüße, 世界 🌍!"


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def receipt_of(llmd: dict[str, str]) -> bytes:
    text = llmd["receipt"]
    assert "=" not in text
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def events(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of every event of a stream, as sent."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        raw = response.read().decode()
    assert raw.endswith("data: [DONE]\n\n")
    return [json.loads(e.removeprefix("data: ")) for e in raw.removesuffix("data: [DONE]\n\n").split("\n\n") if e]


def test_a_whole_answer_has_text_usage_and_receipt(server: Server) -> None:
    raw = server.openai().chat.completions.with_raw_response.create(**ask(SAYING))
    answer: ChatCompletion = raw.parse()
    n = len(SAYING.encode()) + 1
    assert answer.choices[0].message.content == SAYING
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (n, n, 2 * n)
    llmd = answer.model_extra["llmd"]
    receipt = receipt_of(llmd)
    assert llmd["request_id"] == answer.id
    assert canonical.decode(receipt, max_bytes=1000) == {"echo": answer.id, "tokens": n}
    assert raw.headers["x-llmd-receipt"] == str(Cid.of(Codec.DAG_CBOR, receipt))


def test_a_stream_says_the_same_in_the_order_that_clients_expect(server: Server) -> None:
    chunks = list(
        server.openai().chat.completions.create(**ask(SAYING), stream=True, stream_options={"include_usage": True})
    )
    assert len({c.id for c in chunks}) == 1
    assert [c.choices[0].delta.role for c in chunks[:-1]] == ["assistant"] + [None] * (len(chunks) - 2)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == SAYING
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(SAYING.encode()) + 1
    assert all(c.usage is None for c in chunks[:-1])
    assert receipt_of(chunks[-2].model_extra["llmd"])


def test_a_client_that_reads_the_first_choice_of_every_chunk_is_safe(server: Server) -> None:
    chunks = events(server, "/v1/chat/completions", ask("hi"))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hi"
    assert [c for c in chunks if "llmd" in c] == chunks[-1:]


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_completions_take_text_or_ids_alone_or_in_a_list(server: Server, prompt: Any) -> None:
    client = server.openai()
    answer = client.completions.create(model="echo", prompt=prompt)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "stop")
    chunks = list(client.completions.create(model="echo", prompt=prompt, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "abc"
    assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
    assert receipt_of(chunks[-1].model_extra["llmd"])


def test_max_tokens_ends_an_answer_with_length(server: Server) -> None:
    client = server.openai()
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(**ask("abcdef", **{name: 3}))
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc", "length")
    assert client.completions.create(model="echo", prompt="x" * 40).usage.completion_tokens == 16


def test_text_parts_are_joined(server: Server) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    answer = server.openai().chat.completions.create(model="echo", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "a b"


def test_an_answer_can_be_sent_back_as_it_came(server: Server) -> None:
    client = server.openai()
    said = client.chat.completions.create(**ask("one")).choices[0].message
    again = [{"role": "user", "content": "one"}, said.model_dump(), {"role": "user", "content": "two"}]
    answer = client.chat.completions.create(model="echo", messages=again)
    assert answer.choices[0].message.content == "two"


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(alphabet="ab🌍", min_size=1, max_size=20),
    stop=st.lists(st.text(alphabet="ab🌍", min_size=1, max_size=3), min_size=1, max_size=4),
    stream=st.booleans(),
)
def test_no_part_of_a_stop_string_comes_out(server: Server, text: str, stop: list[str], stream: bool) -> None:
    """One token is one byte here, so every stop string is split over tokens, and 🌍 within a character."""
    expected, _ = whole(text, stop)
    got = ""
    if stream:
        chunks = events(server, "/v1/chat/completions", ask(text, stop=stop))
        for chunk in chunks:
            got += chunk["choices"][0]["delta"].get("content", "")
            assert expected.startswith(got)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = server.http.post("/v1/chat/completions", json=ask(text, stop=stop)).json()["choices"][0]
        got, reason = choice["message"]["content"], choice["finish_reason"]
    assert (got, reason) == (expected, "stop")


def test_a_stop_string_ends_generation_and_not_only_the_text(serve: Serve) -> None:
    echo = EchoGenerator(pace_s=0.001)
    server = serve(echo)
    answer = server.openai().chat.completions.create(**ask("stop here" + "x" * 2000, stop=" here"))
    assert answer.choices[0].message.content == "stop"
    assert answer.usage.completion_tokens < 100
    eventually(lambda: echo.served == 1)


def test_fifty_streams_at_once_each_get_their_own_answer(serve: Serve) -> None:
    server = serve(EchoGenerator(pace_s=0.002))
    client = server.openai()

    def one(i: int) -> str:
        chunks = client.chat.completions.create(**ask(f"stream {i} " + "y" * i), stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    assert answers == [f"stream {i} " + "y" * i for i in range(50)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_its_request(serve: Serve, stream: bool) -> None:
    echo = EchoGenerator(pace_s=0.01)
    server = serve(echo)
    with server.http as http:
        body = ask("z" * 2000, stream=stream)
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.3)
    eventually(lambda: echo.cancelled == 1)
    assert echo.status()["running"] == 0


def test_models_are_listed_and_found(server: Server) -> None:
    client = server.openai()
    assert [m.id for m in client.models.list()] == ["echo"]
    card = client.models.retrieve("echo")
    assert card.created == 1_700_000_000 and card.model_extra["llmd"] == {"manifest": str(MODEL.manifest)}


def test_state_health_and_front_page(server: Server) -> None:
    with server.http as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v1/cluster/state").json()["generator"] == "echo"
        assert "echo" in http.get("/").text
