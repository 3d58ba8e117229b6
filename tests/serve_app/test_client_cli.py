"""The client commands, run as programs against a real server."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from serve_app import config
from serve_app.api.auth import ApiKeys
from serve_app.client_cli import register
from shard_tools import canonical
from tests.serve_app.api.echo_server import Serve, Server
from tests.serve_app.api.test_refusals import Failing

app = typer.Typer()
register(app)
run = CliRunner()


def llmd(*args: object, stdin: str | None = None) -> Any:
    return run.invoke(app, [str(a) for a in args], input=stdin)


def test_chat_prints_the_answer_and_saves_receipt_request_and_response(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "answer.receipt"
    result = llmd("chat", "Grüße!", "--url", server.url, "--receipt", file, "--temperature", 0, "--top-k", 3)
    assert (result.exit_code, result.stdout) == (0, "Grüße!\n")
    assert canonical.decode(file.read_bytes(), max_bytes=1000)["tokens"] == len("Grüße!".encode()) + 1
    sent = json.loads((tmp_path / "answer.receipt.request.json").read_text())
    assert (sent["messages"], sent["temperature"], sent["top_k"]) == ([{"role": "user", "content": "Grüße!"}], 0.0, 3)
    assert len(bytes.fromhex(sent["llmd"]["nonce"])) == 32
    got = json.loads((tmp_path / "answer.receipt.response.json").read_text())
    assert (got["choices"][0]["message"]["content"], got["choices"][0]["finish_reason"]) == ("Grüße!", "stop")
    assert "llmd receipt verify" in result.stderr


def test_a_conversation_goes_on_until_an_empty_line(server: Server) -> None:
    result = llmd("chat", "--url", server.url, "--system", "be brief", stdin="one\n/new\ntwo\n\n")
    assert result.exit_code == 0
    assert "one\n" in result.stdout and "two\n" in result.stdout


def test_without_a_url_the_config_file_says_where(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server itself would read it: LLMD_CONFIG, else the example."""
    example = config.config_path(None).read_text()
    file = tmp_path / "config.yaml"
    file.write_text(example.replace("port: 8000", f"port: {server.url.rpartition(':')[2]}"))
    monkeypatch.setenv("LLMD_CONFIG", str(file))
    assert "echo" in llmd("status").stdout
    assert llmd("chat", "Hi").stdout == "Hi\n"


def test_complete_continues_a_text(server: Server) -> None:
    result = llmd("complete", "abcdef", "--url", f"{server.url}/v1", "--max-tokens", 3)
    assert (result.exit_code, result.stdout) == (0, "abc\n")


def test_status_is_a_table_or_json(server: Server) -> None:
    assert "echo" in llmd("status", "--url", server.url).stdout
    assert json.loads(llmd("status", "--url", server.url, "--json").stdout)["generator"] == "echo"


@pytest.mark.parametrize("command", [["chat", "hi"], ["complete", "hi"], ["status"]])
def test_where_nothing_listens_the_message_says_what_to_do(command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = llmd(*command, "--url", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"nothing answers at http://127.0.0.1:{port}" in result.stderr and "llmd serve" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_key_comes_from_a_file(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-a-key-long-enough\n")
    url = serve(keys=ApiKeys.load(tmp_path / "key")).url
    for command in (["chat", "hi"], ["status"]):
        refused = llmd(*command, "--url", url)
        assert refused.exit_code == 1 and "Incorrect API key" in refused.stderr
        assert llmd(*command, "--url", url, "--api-key-file", tmp_path / "key").exit_code == 0
    assert "cannot read the API key" in llmd("status", "--api-key-file", tmp_path / "absent").stderr


def test_what_the_server_says_is_passed_on(server: Server, serve: Serve, tmp_path: Path) -> None:
    result = llmd("chat", "hi", "--url", server.url, "--model", "other")
    assert result.exit_code == 1 and "The model 'other' does not exist here" in result.stderr
    broken = llmd("chat", "hi", "--url", serve(Failing("pipeline", after=1)).url)
    assert broken.exit_code == 1 and "stage 1 died" in broken.stderr
    assert "no URL" in llmd("status", "--url", "ftp://x").stderr
    assert llmd("chat", "hi", "--url", server.url, "--receipt", tmp_path / "no" / "r").exit_code == 1


def test_a_connection_that_breaks_mid_answer_is_an_error_and_not_a_short_answer() -> None:
    chunk = (
        b'data: {"id":"x","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"ab"}]}\n\n'
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    for ending in (b"", b"0\r\n\r\n"):  # cut off, and ended in good order but without a last word
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def answer(listening: socket.socket = listening, ending: bytes = ending) -> None:
                peer, _ = listening.accept()
                with peer:
                    peer.recv(65536)
                    peer.sendall(head + b"%x\r\n%b\r\n" % (len(chunk), chunk) + ending)

            thread = threading.Thread(target=answer)
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            result = llmd("complete", "hi", "--url", url, "--model", "m")
            thread.join(10)
        assert (result.exit_code, result.stdout) == (1, "ab"), result.stderr
        assert "broke" in result.stderr or "cut short" in result.stderr


def test_config_check_says_what_is_meant_or_what_is_wrong(tmp_path: Path) -> None:
    example = Path(config.__file__).with_name("config.yaml")
    result = llmd("config", "check", example)
    assert result.exit_code == 0 and "2 stages" in result.stdout and "http://127.0.0.1:8000/v1" in result.stdout
    bad = tmp_path / "bad.yaml"
    bad.write_text(example.read_text().replace("stages:", "stagse:"))
    result = llmd("config", "check", bad)
    assert result.exit_code == 1 and "did you mean 'stages'?" in result.stderr
