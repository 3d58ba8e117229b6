"""`llmd serve` on loopback for a benchmark: files and HOME of its own, stopped by process id, nothing left behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from benchmarks.models import ModelChoice, PublishedModel, published
from serve_app.config import config_path
from shard_tools.signing import PublicKey, read_public_key
from tests.e2e.cluster import free_port

START_S, STOP_S = 240.0, 60.0


class OwnServer:
    """The application on one published model. As a context it runs inside, and is ready at the beginning."""

    def __init__(self, choice: ModelChoice, stages: int, **pipeline: Any) -> None:
        """pipeline: further keys of args.pipeline."""
        # Short: Ray puts Unix sockets below it, and their paths may have 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="llmd-bench-", ignore_cleanup_errors=True)
        root = self.root = Path(self._folder.name)
        self.model: PublishedModel = published(root / "model", choice)
        document = yaml.safe_load(config_path(None).read_text())
        port = free_port()
        document["http_options"]["port"] = port
        args = document["applications"][0]["args"]
        store, trust = str(self.model.root / "store"), [str(self.model.publisher)]
        args["model"] |= {"name": self.model.manifest.name, "store": store, "trust": trust}
        args["pipeline"] |= {"stages": stages, **pipeline}
        args["identity"]["state_dir"] = str(root / "state")
        self.url, self.log, self._config = f"http://127.0.0.1:{port}", root / "log", root / "config.yaml"
        self._config.write_text(yaml.safe_dump(document))
        for folder in ("home", "ray"):
            (root / folder).mkdir()
        (root / "token").write_text(secrets.token_hex(32))
        self._environment = {
            **os.environ,
            "HOME": str(root / "home"),
            "RAY_TMPDIR": str(root / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",  # Ray's own ports run whatever code is sent to them
            "RAY_AUTH_TOKEN_PATH": str(root / "token"),
            "PYTHONPATH": str(Path(__file__).parents[1]),  # this checkout, whatever is installed
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0  # time.monotonic() when it was spawned

    def start(self) -> None:
        """It is starting."""
        self.started_s = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.cli", "serve", str(self._config), "--new-ray"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )

    def ready(self) -> bool:
        """Whether it has generated a token. Raises RuntimeError with the end of its log if it died."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def __enter__(self) -> OwnServer:
        self.start()
        try:
            while not self.ready():
                if time.monotonic() - self.started_s > START_S:
                    raise RuntimeError(f"not ready after {START_S:.0f} s:\n{self.log.read_text()[-3000:]}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """It is gone, with everything it started."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._folder.cleanup()

    @property
    def operator(self) -> PublicKey:
        """Whose receipts these are."""
        return read_public_key(self.root / "state" / "operator.pub")

    def state(self) -> dict[str, Any]:
        """The pipeline's part of GET /v1/cluster/state."""
        return pipeline_state(self.url)

    def processes(self) -> dict[int, str]:
        """Processes of this server, by their titles."""
        mark, found = f"RAY_TMPDIR={self.root / 'ray'}\0".encode(), {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            try:
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if title and mark in (folder / "environ").read_bytes() + b"\0":
                    found[int(folder.name)] = title
            except OSError:
                continue  # it ended while we looked
        return found


def pipeline_state(url: str) -> dict[str, Any]:
    """The one pipeline of a server of ours. Raises LookupError if it is none of ours."""
    try:
        state: dict[str, Any] = httpx.get(f"{url}/v1/cluster/state", timeout=5).json()["pipelines"][0]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
        raise LookupError(f"{url} shows no /v1/cluster/state") from e
    return state


def _hear_ctrl_c() -> None:
    """A job that a shell started in the background is deaf to SIGINT, by which the server is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
