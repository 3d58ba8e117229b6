"""A running application whose stages give the same bits however they compute: exact answers are held to them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.verdict import Verdict
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import Expected, check
from shard_tools.signing import parse_key, read_public_key
from tests.e2e.cluster import Cluster, eventually
from tests.e2e.test_audit import ask, audit, envelope, found, plugin, raw

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
EXACT = {"x-llmd-assurance": "exact"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    def changes(document: dict[str, Any]) -> None:
        args = document["applications"][0]["args"]
        root = Path(args["identity"]["state_dir"]).parent
        args["pipeline"] |= {
            "deterministic": True,
            "dtype": "float32",
            "engine": {"kind": "cheat", "attacks": "faint-kv", "first": 2, "when": str(root / "cheat")},
        }
        args["audit"] |= {"on_request": True, "retain_bytes": 64 << 20}

    cluster = Cluster(changes)
    cluster.environment["PYTHONPATH"] = os.pathsep.join((str(plugin(cluster.root)), str(Path(__file__).parents[2])))
    try:
        cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.close()


def test_equal_bits_are_promised_and_a_poison_too_faint_for_any_limit_is_found(cluster: Cluster) -> None:
    """Without a calibration; both stages are drawn, only one of them cheats, and only it is blamed."""
    assert eventually(lambda: audit(cluster).get("exact") is True, 60), audit(cluster)
    operator = read_public_key(cluster.root / "state" / "operator.pub")
    for cheat, expected in ((False, {0: {"equal"}, 1: {"equal"}}), (True, {0: {"equal"}, 1: {"unequal"}})):
        if cheat:
            (cluster.root / "cheat").write_text("faint-kv")
        by_stage: dict[int, set[str]] = {}
        for i in range(40):
            answer = ask(cluster, i, **EXACT)
            assert answer.status_code == 200, answer.text
            bundle = Bundle.decode(raw(answer.json()["llmd"]["receipt"]))
            check(bundle, operator, now_s=int(time.time()), request=Expected(assurance="exact"))
            one = found(cluster, answer)
            signed = envelope(one["audit"]["verdict"]["signed"])
            verdict = Verdict.open(signed, frozenset((parse_key(one["audit"]["auditor"]),)))
            assert one["assurance"] == "exact" and verdict.stage == one["audit"]["stage"]
            by_stage.setdefault(verdict.stage, set()).add(verdict.finding)
            if i >= 5 and all(findings <= by_stage.get(stage, set()) for stage, findings in expected.items()):
                break
        # So faint is the poison that an answer may come out with the same bits.
        extra = {1: {"equal"}} if cheat else {}
        assert {stage: findings - extra.get(stage, set()) for stage, findings in by_stage.items()} == expected, by_stage
    # Told a second or two after the verdict. Both stages stand on one host: what was looked at last gives the reason.
    assert eventually(lambda: [node["state"] for node in audit(cluster)["nodes"]] == ["suspect"], 30), audit(cluster)
