"""A real Ray with our application on loopback, for tests: started by documented commands, stopped by process id.

Every process it starts carries RAY_TMPDIR in its environment, which tells them from any other Ray on the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.config import config_path
from shard_tools.index.directory import DirectoryIndex
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.directory import DirectoryStore
from tests.tiny_models import write_tiny_checkpoint

NAME = "tiny"
_BIN = Path(sys.executable).parent


class Cluster:
    """One application, its files, and every process that serves it."""

    def __init__(self, changes: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Publish a tiny model and write a config file; changes: edits the parsed document before it is written."""
        # Short: Ray puts Unix sockets below it, and their paths may have 107 characters.
        self.root = Path(tempfile.mkdtemp(prefix="llmd-e2e-"))
        store = self.root / "store"
        checkpoint = write_tiny_checkpoint(self.root / "checkpoint", layers=4)
        signer = Signer.fresh()
        publish(checkpoint, DirectoryStore(store), DirectoryIndex(store), NAME, signer)
        (self.root / "publisher.pub").write_text(key_text(signer.public) + "\n")
        document = yaml.safe_load(config_path(None).read_text())
        self.port = free_port()
        document["http_options"]["port"] = self.port
        args = document["applications"][0]["args"]
        args["model"] |= {"name": NAME, "store": str(store), "trust": [str(self.root / "publisher.pub")]}
        args["identity"]["state_dir"] = str(self.root / "state")
        args["pipeline"]["kv_memory_bytes"] = 16 << 20
        if changes is not None:
            changes(document)
        self.config = self.root / "config.yaml"
        self.config.write_text(yaml.safe_dump(document))
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.root / "log"
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": str(self.root / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "0",
            # Ray's own ports run whatever code is sent to them, so even here they ask for a token.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.root / "token"),
        }
        (self.root / "ray").mkdir()
        (self.root / "token").write_text(secrets.token_hex(32))
        self._segments = _segments()
        self._main: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A command of this environment, to its end."""
        return subprocess.run(
            [str(_BIN / command[0]), *command[1:]],
            env=self.environment,
            cwd=self.root,  # else Ray's workers import from this checkout first, whatever a runtime_env says
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def start(self, *command: str) -> None:
        """A command that goes on, logged to `log`."""
        with self.log.open("ab") as log:
            self._main = subprocess.Popen(
                [str(_BIN / command[0]), *command[1:]],
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )

    def wait_until_ready(self, timeout_s: float = 150) -> None:
        """Returns when /health says that a token was generated."""

        def healthy() -> bool:
            assert self._main is None or self._main.poll() is None, self.log.read_text()[-4000:]
            try:
                return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        assert eventually(healthy, timeout_s), self.log.read_text()[-4000:] if self.log.exists() else "no log"

    def interrupt(self, timeout_s: float = 60) -> int:
        """Ctrl-C; returns the exit code."""
        assert self._main is not None
        self._main.send_signal(signal.SIGINT)
        return self._main.wait(timeout_s)

    def state(self) -> dict[str, Any]:
        """GET /v1/cluster/state."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/v1/cluster/state", timeout=5).json()
        return answer

    def processes(self, title: str = "") -> dict[int, str]:
        """Processes of this cluster whose command line contains `title`."""
        mark = f"RAY_TMPDIR={self.root / 'ray'}\0".encode()
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line and title in line and mark in (folder / "environ").read_bytes() + b"\0":
                    found[int(folder.name)] = line
            except OSError:
                continue  # it ended while we looked
        return found

    def left_behind(self) -> tuple[dict[int, str], set[str]]:
        """Processes and shared-memory segments that should be gone."""
        return self.processes(), _segments() - self._segments

    def close(self) -> None:
        """Kill whatever is left and remove every file."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.root, ignore_errors=True)


def eventually(holds: Callable[[], bool], timeout_s: float, every_s: float = 0.2) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(every_s)
    return holds()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _hear_ctrl_c() -> None:
    """A job that a shell started in the background is deaf to SIGINT, and so would be what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _segments() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir()}
