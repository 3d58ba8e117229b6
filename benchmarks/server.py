"""`llmd serve` on loopback for a benchmark: files and HOME of its own, stopped by process id, nothing left behind.

What the application itself would have left behind is told before it is cleared away: `OwnServer.left`.
"""

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
from tests.e2e.cluster import eventually, free_port
from tests.e2e.parts import Parts, dashboard_of

START_S, STOP_S = 240.0, 60.0
END_S = 40.0  # after it was stopped: a lease that nobody gave back lapses after 30 s
LABEL = "llmd-bench"  # of Ray nodes: where doors stand, and where stages
OURS = ("ray::_StageProcess", "ray::_HeadProcess", "ray::_SupervisorProcess", "ray::ServeReplica")


class OwnServer:
    """The application on one published model. As a context it runs inside, and is ready at the beginning."""

    def __init__(
        self,
        choice: ModelChoice,
        stages: int,
        *,
        nodes: int = 0,
        ingress: dict[str, Any] | None = None,
        **pipeline: Any,
    ) -> None:
        """nodes: 0: a Ray of its own; n: a Ray of one node for the doors and n for stages, that can die alone.

        ingress, pipeline: further keys of args.ingress and args.pipeline.
        """
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
        args["ingress"] |= ingress or {}
        if nodes:
            args["pipeline"]["node_labels"] = {LABEL: "stage"}
            args["ingress"]["node_labels"] = {LABEL: "door"}
        args["identity"]["state_dir"] = str(root / "state")
        self.url, self.log, self._config = f"http://127.0.0.1:{port}", root / "log", root / "config.yaml"
        self._config.write_text(yaml.safe_dump(document))
        for folder in ("home", "ray", "tmp"):
            (root / folder).mkdir()
        (root / "token").write_text(secrets.token_hex(32))
        self._environment = {
            **os.environ,
            "HOME": str(root / "home"),
            "RAY_TMPDIR": str(root / "ray"),
            "TMPDIR": str(root / "tmp"),  # whatever is left there was left by the application
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",  # Ray's own ports run whatever code is sent to them
            "RAY_AUTH_TOKEN_PATH": str(root / "token"),
            # This checkout, whatever is installed.
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
                ":"
            ),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._nodes, self._ray_port, self._dashboard = nodes, free_port(), free_port()
        self._segments = segments()
        self.started_s = 0.0  # time.monotonic() when it was spawned
        self.left: list[str] = []  # once stopped: what it had not cleared away itself

    def start(self) -> None:
        """It is starting."""
        self.started_s = time.monotonic()
        command = [sys.executable, "-m", "serve_app.cli", "serve", str(self._config)]
        if self._nodes:
            self._environment["RAY_ADDRESS"] = f"127.0.0.1:{self._ray_port}"
            where = ["--head", f"--port={self._ray_port}", f"--dashboard-port={self._dashboard}"]
            self._ray_start(*where, f"--labels={LABEL}=door")
            for _ in range(self._nodes):
                self.start_node()
        else:
            command.append("--new-ray")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
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

    def start_node(self) -> None:
        """A further Ray node for stages is there. Raises RuntimeError."""
        self._ray_start(f"--address=127.0.0.1:{self._ray_port}", f"--labels={LABEL}=stage")

    def _ray_start(self, *where: str) -> None:
        # Several nodes on one host: no port may be a fixed one.
        ports = ("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats"]
        memory = f"--object-store-memory={100 << 20}"
        environment = {k: v for k, v in self._environment.items() if k != "RAY_ADDRESS"}
        try:
            ended = subprocess.run(
                [*command, memory, *ports, *where], env=environment, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired as e:
            raise RuntimeError(f"a Ray node did not start within {e.timeout:.0f} s") from e
        if ended.returncode:
            raise RuntimeError(f"a Ray node did not start:\n{ended.stdout[-1500:]}\n{ended.stderr[-1500:]}")

    def stop(self) -> None:
        """It is gone, with everything it started; `left` says what of it had to be cleared away."""
        if not self.root.exists():
            return
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.left.append(f"its main process, {STOP_S:.0f} s after SIGINT")
                self._process.kill()
                self._process.wait()
            names = OURS if self._nodes else ("",)  # nodes of their own stay, as whoever started them wants
            eventually(lambda: not any(self.processes(name) for name in names), END_S)
            self.left += [f"process {title[:100]}" for name in names for title in self.processes(name).values()]
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        eventually(lambda: not self.processes(), 5)
        self.left += [f"/dev/shm/{name}" for name in sorted(segments() - self._segments)]
        files = sorted(path.name for path in (self.root / "tmp").iterdir())
        # Ray's dashboard keeps a forkserver, whose folder multiprocessing names so and forgets when it is killed.
        self.left += [f"temporary {name}" for name in files if not name.startswith("pymp-")]
        self._folder.cleanup()

    @property
    def operator(self) -> PublicKey:
        """Whose receipts these are."""
        return read_public_key(self.root / "state" / "operator.pub")

    def state(self) -> dict[str, Any]:
        """The pipeline's part of GET /v1/cluster/state."""
        return pipeline_state(self.url)

    def parts(self) -> Parts:
        """Its actors, as Ray's state API knows them. Raises LookupError."""
        dashboard = f"http://127.0.0.1:{self._dashboard}" if self._nodes else dashboard_of(self.log)
        return Parts(dashboard, self.root / "token", self.url)

    def processes(self, title: str = "") -> dict[int, str]:
        """Processes of this server whose command line contains `title`, and their command lines."""
        mark, found = f"RAY_TMPDIR={self.root / 'ray'}\0".encode(), {}
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


def pipeline_state(url: str) -> dict[str, Any]:
    """The one pipeline of a server of ours. Raises LookupError if it is none of ours."""
    try:
        state: dict[str, Any] = httpx.get(f"{url}/v1/cluster/state", timeout=5).json()["pipelines"][0]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
        raise LookupError(f"{url} shows no /v1/cluster/state") from e
    return state


def segments() -> set[str]:
    """Shared memory that has a name on this machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def _hear_ctrl_c() -> None:
    """A job that a shell started in the background is deaf to SIGINT, by which the server is stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
