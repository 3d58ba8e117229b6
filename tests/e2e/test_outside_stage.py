"""A stage of another operator, in another network namespace, without Ray: serves, is cut off, is replaced, leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import check
from shard_tools.signing import parse_key, read_public_key
from tests.e2e.cluster import NAME, Cluster, eventually, free_port
from tests.e2e.far_host import FarHost

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

GRACE_S = 20
CUT_S = 10.0
ASKED: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 400, "temperature": 0, "stream": True}


class Outside:
    """A cluster of one node, and the last of its two stages elsewhere."""

    def __init__(self, far: FarHost) -> None:
        self.far, self.port, self.dashboard = far, 7070, free_port()
        self.cluster = Cluster(self._name_the_stage)
        self.client = OpenAI(base_url=f"{self.cluster.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.stage: subprocess.Popen[bytes] | None = None

    def _name_the_stage(self, document: dict[str, Any]) -> None:
        root = Path(document["applications"][0]["args"]["identity"]["state_dir"]).parent
        self.key = _node_key(root / "theirs")
        entry = {"stage": 1, "address": f"{self.far.address}:{self.port}", "key": self.key, "grace_s": GRACE_S}
        document["applications"][0]["args"]["pipeline"]["outside"] = [entry]

    def start(self) -> None:
        """Its own layers fetched to a store of its own; then both sides."""
        root = self.cluster.root
        fetched = self.cluster.run(
            *("llmd", "fetch", NAME, "--from", str(root / "store"), "--store", str(root / "far-store")),
            *("--layers", "2:4", "--trust", str(root / "publisher.pub")),
        )
        assert fetched.returncode == 0, fetched.stderr
        self.start_stage()
        ports = (f"--port={free_port()}", f"--dashboard-port={self.dashboard}", f"--node-ip-address={self.far.here}")
        started = self.cluster.run("ray", "start", "--head", "--num-cpus=2", "--disable-usage-stats", *ports)
        assert started.returncode == 0, started.stderr
        self.deploy()
        self.cluster.wait_until_ready()

    def deploy(self) -> None:
        """The configuration as it stands now."""
        deployed = self.cluster.run("serve", "deploy", str(self.cluster.config), "-a", self.dashboard_url)
        assert deployed.returncode == 0, deployed.stderr

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start_stage(self) -> None:
        root = self.cluster.root
        words = ["--listen", f"{self.far.address}:{self.port}", "--controller", _node_key(root / "state")]
        words += ["--store", str(root / "far-store"), "--trust", str(root / "publisher.pub"), "--layers", "2:4"]
        words += ["--state-dir", str(root / "theirs"), "--kv-memory-bytes", str(16 << 20)]
        with (root / "stage-log").open("ab") as log:
            self.stage = subprocess.Popen(
                [*self.far.prefix, str(Path(sys.executable).parent / "llmd"), "stage", *words],
                env=self.cluster.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stages(self) -> list[dict[str, Any]]:
        try:
            stages: list[dict[str, Any]] = self.cluster.state()["pipelines"][0]["stages"]
        except (httpx.HTTPError, LookupError):
            return [{}, {}]  # between two doors
        return stages or [{}, {}]

    def epoch(self) -> int:
        epoch: int = self.cluster.state()["pipelines"][0]["epoch"]
        return epoch

    def close(self) -> None:
        if self.stage is not None:
            self.stage.kill()
            self.stage.wait()
        self.cluster.close()


@pytest.fixture(scope="module")
def far() -> Iterator[FarHost]:
    try:
        far = FarHost()
    except OSError as e:
        pytest.skip(f"no network namespace can be made here: {e}")
    yield far
    far.close()


@pytest.fixture(scope="module")
def outside(far: FarHost) -> Iterator[Outside]:
    outside = Outside(far)
    try:
        outside.start()
        yield outside
    finally:
        outside.close()


@pytest.fixture(scope="module")
def undisturbed(outside: Outside) -> str:
    return _text(outside.client.completions.create(**ASKED))


def test_it_serves_and_signs_with_its_own_key(outside: Outside) -> None:
    """The receipt verifies, and names it as the node of stage 1; the cluster's own node is that of stage 0."""
    answer = outside.client.completions.create(model=NAME, prompt="a", max_tokens=8)
    assert answer.model_extra is not None
    bundle = Bundle.from_text(answer.model_extra["llmd"]["receipt"])
    operator = read_public_key(outside.cluster.root / "state" / "operator.pub")
    seen = check(bundle, operator, now_s=int(time.time()))
    theirs, ours = parse_key(outside.key), parse_key(_node_key(outside.cluster.root / "state"))
    assert [statement.node for statement in seen.statements] == [ours, theirs]
    assert len(outside.cluster.processes("ray::_StageProcess")) == 1
    assert outside.stages()[1]["outside"] == f"{outside.far.address}:{outside.port}"


def test_rows_are_signed_for_between_the_two_operators(outside: Outside) -> None:
    """Stage 0 signs for what it sends out of the cluster, each step; stage 1 answers for nothing that is not."""
    before = outside.stages()[0].get("deliveries_signed", 0)
    _text(outside.client.completions.create(model=NAME, prompt="b", max_tokens=8, stream=True))
    assert eventually(lambda: outside.stages()[0].get("deliveries_signed", 0) >= before + 8, 10)


def test_a_link_that_is_cut_for_ten_seconds_is_a_pause(outside: Outside, undisturbed: str) -> None:
    """The stream waits and goes on with the same text; the same process takes its place again, its layers loaded."""
    epoch, before = outside.epoch(), outside.stages()[1]
    chunks = outside.client.completions.create(**ASKED)
    began = [next(chunks) for _ in range(10)]
    outside.far.cut()
    cut_s = time.monotonic()
    timer = threading.Timer(CUT_S, outside.far.mend)
    timer.start()
    text = _text(began) + _text(chunks)
    paused_s = time.monotonic() - cut_s
    timer.join()
    assert text == undisturbed
    assert CUT_S < paused_s < CUT_S + 15
    assert eventually(lambda: outside.epoch() > epoch, 10)
    assert eventually(lambda: outside.stages()[1].get("outside") == before["outside"], 10)
    assert outside.stages()[1]["load_ms"] == before["load_ms"]


def test_a_stage_that_is_killed_and_started_again_takes_its_place(outside: Outside, undisturbed: str) -> None:
    """Within its grace, as after a cut."""
    assert outside.stage is not None
    chunks = outside.client.completions.create(**ASKED)
    began = [next(chunks) for _ in range(10)]
    outside.stage.kill()
    outside.stage.wait()
    outside.start_stage()
    assert _text(began) + _text(chunks) == undisturbed
    assert eventually(lambda: "outside" in outside.stages()[1], 10)


def test_one_that_is_cut_off_for_longer_is_replaced_by_the_cluster(outside: Outside, undisturbed: str) -> None:
    """The stream goes on without it; and it waits, with its layers, for whoever takes it next."""
    chunks = outside.client.completions.create(**ASKED)
    began = [next(chunks) for _ in range(10)]
    outside.far.cut()
    try:
        assert _text(began) + _text(chunks) == undisturbed
        assert eventually(lambda: len(outside.stages()) == 2 and "outside" not in outside.stages()[1], 10)
        assert len(outside.cluster.processes("ray::_StageProcess")) == 2
    finally:
        outside.far.mend()
    assert "is given up" in (outside.cluster.root / "stage-log").read_text()


def test_it_joins_the_next_pipeline_and_leaves_it_again(outside: Outside, undisturbed: str) -> None:
    """A changed configuration makes the pipeline anew, with it; Ctrl-C, and nobody waits until its grace is over."""
    text = outside.cluster.config.read_text()
    outside.cluster.config.write_text(text.replace(f"grace_s: {GRACE_S}", "grace_s: 100"))
    outside.deploy()
    assert eventually(lambda: "outside" in outside.stages()[1], 60)
    chunks = outside.client.completions.create(**ASKED)
    began = [next(chunks) for _ in range(10)]
    assert outside.stage is not None
    outside.stage.send_signal(signal.SIGINT)
    left_s = time.monotonic()
    assert _text(began) + _text(chunks) == undisturbed
    assert time.monotonic() - left_s < 30
    assert outside.stage.wait(10) == 0
    assert eventually(lambda: "outside" not in outside.stages()[1], 10)


def test_nothing_is_left(outside: Outside) -> None:
    """Runs last."""
    assert outside.cluster.run("serve", "shutdown", "-y", "-a", outside.dashboard_url).returncode == 0
    ours = ("ray::_StageProcess", "ray::_HeadProcess", "ray::_SupervisorProcess", "pulse.py")
    assert eventually(lambda: not any(outside.cluster.processes(title) for title in ours), 40)
    assert not outside.cluster.processes("llmd stage")


def _node_key(state_dir: Path) -> str:
    words = [str(Path(sys.executable).parent / "llmd"), "registry", "node", "--state-dir", str(state_dir)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _text(chunks: Iterable[Any]) -> str:
    return "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices)
