"""The same config file under `serve deploy` on a Ray that runs already, and its removal by `serve shutdown`."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.cluster import NAME, Cluster, eventually, free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()


def test_deploy_answers_and_shutdown_removes_the_detached_pipeline(cluster: Cluster) -> None:
    """Stages and Head are detached, so it is the end of the ingress's lease that removes them: it gives it back."""
    dashboard = free_port()
    ports = (f"--port={free_port()}", f"--dashboard-port={dashboard}")
    started = cluster.run("ray", "start", "--head", "--num-cpus=2", "--disable-usage-stats", *ports)
    assert started.returncode == 0, started.stderr
    address = f"http://127.0.0.1:{dashboard}"
    deployed = cluster.run("serve", "deploy", str(cluster.config), "-a", address)
    assert deployed.returncode == 0, deployed.stderr
    cluster.wait_until_ready()
    request = {"model": NAME, "prompt": "a", "max_tokens": 3}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == 200 and answer.json()["llmd"]["receipt"]

    # The same file with another number of stages: the pipeline is replaced, whichever replica's lease comes first.
    text = cluster.config.read_text()
    assert "stages: 2" in text
    cluster.config.write_text(text.replace("stages: 2", "stages: 1"))
    assert cluster.run("serve", "deploy", str(cluster.config), "-a", address).returncode == 0
    assert eventually(lambda: stages(cluster) == [[0, 4]], 90)

    assert cluster.run("serve", "shutdown", "-y", "-a", address).returncode == 0
    ours = ("ray::_StageProcess", "ray::_HeadProcess", "ray::_SupervisorProcess")
    assert eventually(lambda: not any(cluster.processes(title) for title in ours), 60)


def stages(cluster: Cluster) -> list[list[int]]:
    """The layers of each stage that serves now."""
    try:
        pipelines = cluster.state().get("pipelines", [])
    except httpx.HTTPError:
        return []
    return [stage["layers"] for pipeline in pipelines for stage in pipeline["stages"]]
