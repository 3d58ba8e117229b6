"""A package of somebody else's, installed by pip, adds an engine, a store and an index, chosen by name in a config."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import NAME, Cluster
from tests.plugins.installed import ROOT, environment, install


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugins"))


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(site), cwd=ROOT, capture_output=True, text=True, timeout=110
    )


@pytest.mark.slow
def test_the_contract_suites_hold_for_them_unchanged(site: Path) -> None:
    tests = site.parent / "source" / "tests"
    done = run(site, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(tests))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_a_config_that_names_them_is_served_and_the_receipt_verifies(site: Path, tmp_path: Path) -> None:
    """The answer is that of the plain engine from the same blocks; the profile that a stage signs names the engine."""
    done = run(site, "-m", "tests.plugins.serve_with_plugins", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    ours, plain = json.loads(done.stdout.splitlines()[-1])
    assert ours == plain and len(ours) == 8
    assert "llmd_example_plugins numpy" in done.stderr


def test_what_the_factory_does_not_take_is_refused_by_name(site: Path) -> None:
    code = (
        "from serve_app.choices import store_of as s; from shard_tools.choice import Choice as C; s(C.of('sqlite', %s))"
    )
    for options, said in (
        ("pth='/x'", "has no option 'pth'; did you mean 'path'?"),
        ("", "needs the option 'path'"),
        ("path='x'", "'x' is relative"),
        ("path=5", "expected a path, found '5'"),
    ):
        done = run(site, "-c", code % options)
        assert said in done.stderr.splitlines()[-1]


@pytest.fixture
def cluster(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Its model is copied from the folder it was published in into SQLite, by the package."""
    models = {"kind": "sqlite", "path": str(tmp_path / "models.db")}

    def choose(document: dict[str, Any]) -> None:
        args = document["applications"][0]["args"]
        copy = (
            "import sys; from pathlib import Path; from shard_tools.store.directory import DirectoryStore as D;"
            "from shard_tools.index.directory import DirectoryIndex as I;"
            "from llmd_example_plugins.sqlite_store import SqliteStore as S;"
            "from llmd_example_plugins.sqlite_index import SqliteIndex as N;"
            "a, b, n = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]; d, s = D(a), S(b);"
            "[s.put(c.codec, d.get(c)) for c in d.cids()]; N(b).publish(n, I(a).resolve(n), s.has)"
        )
        done = run(site, "-c", copy, args["model"]["store"], models["path"], NAME)
        assert done.returncode == 0, done.stderr
        args["model"] |= {"store": models, "index": dict(models)}  # two, or YAML would write an alias
        args["pipeline"] |= {"engine": "numpy", "dtype": "float32"}

    monkeypatch.setenv("PYTHONPATH", environment(site)["PYTHONPATH"])
    cluster = Cluster(choose)
    try:
        cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_application_serves_through_them(cluster: Cluster) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 5}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["llmd"]["receipt"] and answer["usage"]["completion_tokens"] >= 1
    cluster.interrupt()
