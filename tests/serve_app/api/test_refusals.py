"""Bad input gets the OpenAI error body, with the status that clients act on, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.datastructures import Headers

from serve_app.api.auth import ApiKeys
from serve_app.api.echo import EchoGenerator
from serve_app.api.idempotency import once_of
from serve_app.api.problems import problem_of
from serve_app.api.wire import ChatBody, CompletionBody, parse
from serve_app.errors import ConfigError, MismatchError
from serve_app.messages.request import Event, FailedEvent, GenerationRequest, Once, TokensEvent
from tests.serve_app.api.echo_server import Serve, Server

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * 100}]}
KEY = "sk-a-key-long-enough"


def refused(server: Server, status: int, body: Any, path: str = CHAT) -> dict[str, Any]:
    """The error object of a request that must be refused."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.http as http:
        response = http.post(path, content=raw)
        assert response.status_code == status, response.text
        assert response.headers["x-request-id"]
        error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temperature": 5}, "temperature", "less than or equal to 2 (found 5)"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "send one of them"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"n": 2}, "n", "not supported here; leave it out (or send 1)"),
        ({"n": True}, "n", "not supported"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "at least 1"),
        ({"stop": "x" * 257}, "stop", "at most 256"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usag": True}}, "stream_options", "include_usag"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": "much"}, "frequency_penalty", "valid number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"07": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"llmd": {"nonce": "00"}}, "llmd", "llmd.nonce"),
        ({"llmd": {"priority": 5}}, "llmd", "less than or equal to 4"),
        ({"llmd": {"priority": 1.5}}, "llmd", "llmd.priority"),
        ({"llmd": {"cache_salt": "x" * 65}}, "llmd", "llmd.cache_salt"),
        ({"llmd": {"cache_salt": "é"}}, "llmd", "llmd.cache_salt"),
        ({"timeout": 0}, "timeout", "greater than or equal to 0.001"),
        ({"timeout": 86_401}, "timeout", "less than or equal to 86400"),
        ({"timeout": "5s"}, "timeout", "valid number"),
        ({"timeout": 5, "llmd": {"deadline_ms": 5000}}, "timeout", "send one of them"),
        ({"llmd": {"deadline_ms": 0}}, "llmd", "llmd.deadline_ms"),
        ({"llmd": {"deadline_ms": 1.5}}, "llmd", "llmd.deadline_ms"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [GOOD["messages"][0]] * 2049}, "messages", "at most 2048"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages", "content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
        ({"model": 3}, "model", "valid string"),
    ],
)
def test_a_field_that_cannot_be_acted_on_is_named(
    server: Server, change: dict[str, Any], param: str, said: str
) -> None:
    error = refused(server, 400, GOOD | change)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    body = GOOD | {
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "service_tier": "auto",
        "presence_penalty": 0.0,
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_k": 5,
        "seed": -3,
        "stop": None,
        "llmd": {"nonce": "ab" * 32, "priority": -4, "cache_salt": "tenant-7"},
    }
    with server.http as http:
        assert http.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b'{"model": NaN}', b'{"a":' * 5000, b'{"model":"\\ud800"}'],
)
def test_malformed_json_is_a_400(server: Server, raw: bytes) -> None:
    assert refused(server, 400, raw)["type"] == "invalid_request_error"


def test_a_prompt_longer_than_the_context_is_a_400_that_clients_recognise(server: Server) -> None:
    error = refused(server, 400, GOOD | {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 4096 tokens. However, you requested")
    assert refused(server, 400, GOOD | {"max_tokens": 4096})["code"] == "context_length_exceeded"
    error = refused(server, 400, {"model": "echo", "prompt": "x" * 4096}, "/v1/completions")
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", "b"], [[1], [2]], [1, "a"], [300], [-1], {"a": 1}, None])
def test_a_prompt_that_is_no_single_prompt_is_a_400(server: Server, prompt: Any) -> None:
    error = refused(server, 400, {"model": "echo", "prompt": prompt}, "/v1/completions")
    assert error["param"] == "prompt"


def test_an_unknown_model_and_an_unknown_url_are_404(server: Server) -> None:
    error = refused(server, 404, GOOD | {"model": "gpt-5"})
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "echo" in error["message"]
    with pytest.raises(openai.NotFoundError):
        server.openai().models.retrieve("gpt/5")
    assert refused(server, 404, {}, "/v1/embeddings")["code"] == "unknown_url"
    with server.http as http:
        response = http.get(CHAT)
        assert response.status_code == 405 and response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_a_413_announced_or_not(serve: Serve) -> None:
    server = serve(max_body_bytes=2048)
    assert refused(server, 413, b"x" * 4096)["code"] == "request_too_large"
    with server.http as http:
        chunked = http.post(CHAT, content=(b"x" * 512 for _ in range(8)))
        assert chunked.status_code == 413


def test_without_an_accepted_key_everything_but_health_is_closed(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\nsha256:{hashlib.sha256(b'another').hexdigest()}\n")
    server = serve(keys=ApiKeys.load(file))
    with server.http as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            for path in ("/v1/models", "/v1/cluster/state", "/v1/nowhere", "/elsewhere", "/v1/../v1/models"):
                response = http.get(path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong").models.list()
    for key in (KEY, "another"):
        assert server.openai(key).chat.completions.create(**GOOD).choices[0].message.content == "hi"


@pytest.mark.parametrize("content", ["", "# none\n", "short\n", "two words are no key at all\n", "sha256:abc\n"])
def test_a_key_file_that_does_not_close_the_door_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match="keys"):
        ApiKeys.load(file)
    with pytest.raises(ConfigError, match="cannot read"):
        ApiKeys.load(tmp_path / "absent")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_429_and_when_to_come_back(serve: Serve, stream: bool) -> None:
    server = serve(EchoGenerator(max_running=0))
    with server.http as http:
        response = http.post(CHAT, json=GOOD | {"stream": stream})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


class Failing(EchoGenerator):
    """Says one token, if asked to, and then fails."""

    def __init__(self, kind: Any, after: int) -> None:
        super().__init__()
        self._kind, self._after = kind, after

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        for _ in range(self._after):
            yield TokensEvent(request.id, (97,))
        if self._kind == "bug":
            raise ZeroDivisionError("a secret of ours")
        yield FailedEvent(request.id, self._kind, "stage 1 died")

    async def ready(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("request", 400, None),
        ("overloaded", 429, "rate_limit_exceeded"),
        ("pipeline", 503, "pipeline_error"),
        ("integrity", 500, "integrity_error"),
        ("deadline", 504, "deadline_exceeded"),
        ("key_reused", 422, "idempotency_key_reused"),
        ("taken_over", 409, "request_taken_over"),
        ("bug", 500, "internal_error"),
    ],
)
def test_a_failure_is_a_status_before_the_first_byte_and_an_event_after(
    serve: Serve, kind: str, status: int, code: str | None
) -> None:
    server = serve(Failing(kind, after=0))
    for stream in (False, True):
        error = refused(server, status, GOOD | {"stream": stream})
        assert error["code"] == code and "secret" not in error["message"]
    server = serve(Failing(kind, after=1))
    with server.http as http:
        raw = http.post(CHAT, json=GOOD | {"stream": True}).text
    *_, failed, done, _ = raw.split("\n\n")
    assert json.loads(failed.removeprefix("data: "))["error"]["code"] == code and done == "data: [DONE]"
    with pytest.raises(openai.APIError):
        list(server.openai().chat.completions.create(**GOOD, stream=True))


@pytest.mark.parametrize("limit", [{"timeout": 0.1}, {"llmd": {"deadline_ms": 100}}])
def test_a_deadline_is_a_504_before_the_first_byte_and_an_event_after(serve: Serve, limit: dict[str, Any]) -> None:
    """And nobody sends it again by itself: OpenAI's client would, on any other 5xx."""
    for stream, pace_s in ((False, 0.02), (True, 5.0)):
        echo = EchoGenerator(pace_s=pace_s)
        server = serve(echo)
        with server.http as http:
            response = http.post(CHAT, json=GOOD | limit | {"stream": stream} | LONG)
        assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert (echo.cancelled, echo.status()["running"]) == (1, 0)
    server = serve(EchoGenerator(pace_s=0.02))
    with server.http as http:
        raw = http.post(CHAT, json=GOOD | limit | {"stream": True} | LONG).text
    *_, failed, done, _ = raw.split("\n\n")
    assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "deadline_exceeded" and done == "data: [DONE]"


@pytest.mark.parametrize("keys", [[""], ["a b"], ['"a'], ["é"], ["x" * 256], ["a", "a"]])
def test_an_idempotency_key_that_is_none_is_refused(server: Server, keys: list[str]) -> None:
    with server.http as http:
        headers = [("Idempotency-Key", key.encode()) for key in keys]
        response = http.post(CHAT, json=GOOD, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 400 and response.json()["error"]["param"] == "Idempotency-Key"


def test_a_retry_is_known_by_all_that_decides_its_answer_and_by_whose_it_is() -> None:
    def once(key: str = "k", authorization: str = "Bearer one", kind: Any = ChatBody, **change: Any) -> Once:
        made = once_of(Headers({"Idempotency-Key": key, "authorization": authorization}), parsed(kind, change))
        assert made is not None
        return made

    def parsed(kind: Any, change: dict[str, Any]) -> Any:
        body = GOOD if kind is ChatBody else {"model": "echo", "prompt": "hi"}
        return parse(json.dumps(body | change).encode(), kind)

    first = once()
    assert first == once('"k"') == once(stream=True, timeout=3) == once(llmd=None) == once()
    assert once(llmd={}) == once(llmd={"deadline_ms": 5})
    assert first.key != once("l").key and first.key != once(authorization="Bearer two").key
    for change in ({"max_tokens": 5}, {"seed": 1}, {"stop": "x"}, {"llmd": {"nonce": "00" * 32}}):
        assert first.key == once(**change).key and first.asked != once(**change).asked
    assert first.asked != once(kind=CompletionBody).asked
    assert once_of(Headers({}), parsed(ChatBody, {})) is None


def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    where = httpx.URL(server.url)
    with socket.create_connection((where.host, where.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    with server.http as http:
        assert http.post(CHAT, json=GOOD).status_code == 200
    assert not caplog.records


@pytest.mark.parametrize("junk", [b"\x00\xff", "sk-ä".encode(), b"Bearer", b"Bearer  "])
def test_a_malformed_authorization_is_a_401(serve: Serve, junk: bytes) -> None:
    server = serve(keys=ApiKeys([b"0" * 32]))
    where = httpx.URL(server.url)
    with socket.create_connection((where.host, where.port)) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: " + junk + b"\r\n\r\n")
        assert client.recv(100).split()[1] in (b"401", b"400")  # 400: the HTTP server itself refuses such bytes


def test_an_integrity_error_comes_with_the_heads_signed_word() -> None:
    body = problem_of(MismatchError("stage 1 received other rows than stage 0 sent", b"signed")).body()
    assert body["llmd"] == {"evidence": "c2lnbmVk"} and body["error"]["code"] == "integrity_error"


def test_health_is_503_until_a_token_was_generated(serve: Serve) -> None:
    with serve(Failing("pipeline", 0)).http as http:
        response = http.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"


@pytest.mark.parametrize(("sent", "echoed"), [("abc-1", True), ("a b", False), ("x" * 129, False), ("", False)])
def test_a_request_id_is_echoed_if_it_is_short_and_plain(server: Server, sent: str, echoed: bool) -> None:
    with server.http as http:
        got = http.get("/health", headers={"X-Request-Id": sent}).headers["x-request-id"]
    assert (got == sent) == echoed and got
