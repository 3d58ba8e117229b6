"""A running application that audits itself: an honest pipeline passes, one stage begins to cheat and is found.

The stage cheats by an engine that the config names and a package adds, as any other; the package is made here.
"""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.audit.auditor import Auditor
from serve_app.audit.band import calibrate_draws
from serve_app.audit.calibration import calibrate
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.redraw import Redrawer
from serve_app.audit.verdict import Verdict
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, load_head
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import Expected, check
from serve_app.receipts.log import TreeHead, require_included
from serve_app.receipts.statement import envelope_cid
from serve_app.rehearsal import rehearse
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.fetch import load_manifest
from shard_tools.index.directory import DirectoryIndex
from shard_tools.signing import Envelope, Signer, parse_key, read_public_key
from shard_tools.store.directory import DirectoryStore
from tests.e2e.cluster import NAME, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
VERDICT_S = 60  # what is promised; here it takes some seconds


def plugin(folder: Path) -> Path:
    """A package of nothing but an entry point, as pip would have left it."""
    info = folder / "site" / "llmd_cheat-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmd-cheat\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[llmd.engines]\ncheat = serve_app.engine.dishonest:load_dishonest\n")
    return folder / "site"


def calibrations(folder: Path) -> dict[str, list[str]]:
    """Of both stages and of draws, out of honest requests in this process: blocks of the store, by setting."""
    store = DirectoryStore(folder)
    manifest = load_manifest(store, DirectoryIndex(folder).resolve(NAME).manifest)
    prompts = [[3 + (i * 7 + k * (5 + i % 11)) % 100 for k in range(10)] for i in range(16)]
    options = LoadOptions("cpu", "float32", 16, 1)
    honest = rehearse(store, manifest, prompts, stages=2, options=options, tokens=14)
    replayer = Auditor(store, manifest, LoadOptions("cpu", "float32", 16, 1, engine=TORCH), (), Signer.fresh())
    made = []
    for stage in range(2):
        statements = [r.receipt.statements[stage] for r in honest]
        calibration = calibrate(statements, *replayer.compare(statements, [r.records[stage] for r in honest]))
        made.append(str(store.put(Codec.DAG_CBOR, calibration.encode())))
    head = load_head(store, manifest, LoadOptions("cpu", "float32", 16, 1, engine=TORCH))
    redrawer = Redrawer(manifest, lambda: head, (), Signer.fresh())
    margins = [redrawer.margins(r.receipt, r.records[-1]) for r in honest]
    band = calibrate_draws(manifest.cid, honest[0].receipt.statements[-1].profile, head.profile, margins)
    return {"calibration": made, "band": [str(store.put(Codec.DAG_CBOR, band.encode()))]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    def changes(document: dict[str, Any]) -> None:
        args = document["applications"][0]["args"]
        root = Path(args["identity"]["state_dir"]).parent
        args["pipeline"] |= {
            "dtype": "float32",
            "engine": {
                "kind": "cheat",
                "attacks": "int8 cooler seldom-other-noise",
                "first": 2,
                "when": str(root / "cheat"),
            },
        }
        known = calibrations(Path(args["model"]["store"]))
        args["audit"] |= {"rate": 1.0, "on_request": True, "retain_bytes": 64 << 20, **known}

    cluster = Cluster(changes)
    path = os.pathsep.join((str(plugin(cluster.root)), str(Path(__file__).parents[2])))
    cluster.environment["PYTHONPATH"] = path
    try:
        cluster.start("llmd", "serve", str(cluster.config), "--new-ray")
        cluster.wait_until_ready()
        assert eventually(lambda: audit(cluster)["problem"] is None, 60), audit(cluster)
        yield cluster
    finally:
        cluster.close()


def audit(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.state().get("audit", {"problem": "not told"})
    return found


def cheat(cluster: Cluster, attack: str) -> None:
    """From now on in this way; empty: not at all. Written beside and moved, since the stage may look at any time."""
    (cluster.root / "cheat.new").write_text(attack)
    (cluster.root / "cheat.new").replace(cluster.root / "cheat")


def ask(cluster: Cluster, i: int, tokens: int = 12, **headers: str) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": f"{i}" * 9}], "max_tokens": tokens, "seed": i}
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def found(cluster: Cluster, answer: httpx.Response) -> dict[str, Any]:
    """What an audit found of this answer, of a stage and of its tokens, in time."""
    url = f"{cluster.url}/v1/receipts/{answer.json()['id']}"

    def judged() -> bool:
        said = httpx.get(url, timeout=10)
        audit = said.json()["audit"] if said.status_code == 200 else {"verdict": None, "draws": {"verdict": None}}
        return audit["verdict"] is not None and audit["draws"]["verdict"] is not None

    assert eventually(judged, VERDICT_S), httpx.get(url, timeout=10).text
    said: dict[str, Any] = httpx.get(url, timeout=10).json()
    return said


def raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def envelope(text: str) -> Envelope:
    return Envelope.from_value(canonical.decode(raw(text), max_bytes=1 << 16), "envelope", 1 << 16)


def test_an_honest_pipeline_passes_and_everything_said_of_it_can_be_checked(cluster: Cluster) -> None:
    """Every answer is audited, the promised ones say so in their receipts; all of it is in the signed log.

    Of each its tokens are drawn again too, whichever stage was drawn for it.
    """
    answers = [ask(cluster, i, **({"x-llmd-assurance": "audited"} if i % 2 else {})) for i in range(12)]
    said = [found(cluster, answer) for answer in answers]
    assert {one["audit"]["verdict"]["finding"] for one in said} == {"pass"}
    assert {one["audit"]["draws"]["verdict"]["finding"] for one in said} == {"pass"}
    assert {one["audit"]["stage"] for one in said} == {0, 1}
    operator = read_public_key(cluster.root / "state" / "operator.pub")
    for i, (answer, one) in enumerate(zip(answers, said, strict=True)):
        level = Expected(assurance="audited" if i % 2 else "signed")
        bundle = Bundle.decode(raw(answer.json()["llmd"]["receipt"]))
        check(bundle, operator, now_s=int(time.time()), request=level)
        assert one["receipt"] == answer.json()["llmd"]["receipt"]
        key = parse_key(one["audit"]["auditor"])
        verdict = Verdict.open(envelope(one["audit"]["verdict"]["signed"]), frozenset((key,)))
        assert verdict.finding == "pass" and verdict.stage == one["audit"]["stage"]
        sealed = envelope(one["audit"]["draws"]["verdict"]["signed"])
        draws = DrawVerdict.open(sealed, frozenset((key,)))
        receipt, tokens = Cid.of(Codec.DAG_CBOR, raw(one["receipt"])), answer.json()["usage"]["completion_tokens"]
        assert (draws.finding, draws.receipt, draws.tokens) == ("pass", receipt, tokens)
        head = TreeHead.open(envelope(one["log"]["head"]), key)
        for what, cid in (("receipt", receipt), ("draws", envelope_cid(sealed))):
            proof = one["log"][what]
            require_included(bytes(cid), proof["index"], head, [raw(node) for node in proof["path"]])
    state = audit(cluster)
    assert {node["state"] for node in state["nodes"]} <= {"active"} and state["watched"] == []
    assert state["unaudited"] <= 1  # the first token's own receipt
    assert state["auditor"]["samplers"] == 0 and eventually(lambda: audit(cluster)["auditor"]["redrawn"] >= 12, 20)
    assert "audit" in cluster.run("llmd", "status", "--url", cluster.url).stdout


def test_a_stage_that_begins_to_cheat_is_found_and_nobody_else_blamed(cluster: Cluster) -> None:
    """Its verdicts are faults, the other stage's passes; the node is a suspect, which one auditor cannot make worse.

    Its tokens are what its rows give, so drawing them again finds nothing: that is what the stage's own audit is for.
    """
    cheat(cluster, "int8")
    by_stage: dict[int, set[str]] = {0: set(), 1: set()}
    for i in range(100, 112):
        one = found(cluster, ask(cluster, i))
        by_stage[one["audit"]["stage"]].add(one["audit"]["verdict"]["finding"])
        assert one["audit"]["draws"]["verdict"]["finding"] == "pass"
    assert by_stage == {0: {"pass"}, 1: {"fault"}}
    assert eventually(lambda: audit(cluster)["watched"] == [0, 1], 20)  # both stages stand on this one node
    (node,) = audit(cluster)["nodes"]
    assert node["state"] == "suspect" and node["why"].startswith("operator ")
    cheat(cluster, "")


def test_a_sampler_that_does_not_draw_as_it_was_asked_is_found(cluster: Cluster) -> None:
    """Another temperature at once, one wrong token in a hundred within some answers; all layers pass meanwhile.

    It is the last stage's doing, which signed for these tokens: its node stays a suspect, for this reason now. All are
    promised, and so share no beginning with an answer whose rows were let go.
    """
    for attack, tokens in (("cooler", 40), ("seldom-other-noise", 150)):
        cheat(cluster, attack)
        findings: list[str] = []
        while "sampler" not in findings and len(findings) < 8:
            answer = ask(cluster, 300 + len(findings), tokens, **{"x-llmd-assurance": "audited"})
            said = found(cluster, answer)["audit"]
            assert said["verdict"]["finding"] == "pass"
            findings.append(said["draws"]["verdict"]["finding"])
        assert set(findings) - {"pass"} == {"sampler"}, (attack, findings)
    cheat(cluster, "")
    answer = ask(cluster, 300, 40, **{"x-llmd-assurance": "audited"})
    assert found(cluster, answer)["audit"]["draws"]["verdict"]["finding"] == "pass"
    assert eventually(lambda: audit(cluster)["auditor"]["samplers"] == 2, 20), audit(cluster)["auditor"]
    assert eventually(lambda: ["tokens" in node["why"] for node in audit(cluster)["nodes"]] == [True], 20)
    assert [node["state"] for node in audit(cluster)["nodes"]] == ["suspect"]


@pytest.mark.parametrize(("level", "why"), [("exact", "pipeline.deterministic"), ("certain", "llmd.assurance")])
def test_a_level_that_there_is_not_is_refused(cluster: Cluster, level: str, why: str) -> None:
    """Here, or at all."""
    answer = ask(cluster, 1, **{"x-llmd-assurance": level})
    assert answer.status_code == 400 and why in answer.text


def test_an_auditor_that_stands_still_stops_audits_and_nothing_else(cluster: Cluster) -> None:
    """It is said in the state; promises are refused for now; answers go on, and are audited when it goes on."""
    (auditor,) = cluster.processes("ray::_AuditorProcess")
    os.kill(auditor, signal.SIGSTOP)
    try:
        answer = ask(cluster, 200)
        assert answer.status_code == 200
        assert eventually(lambda: audit(cluster)["problem"] is not None, 30)
        refused = ask(cluster, 201, **{"x-llmd-assurance": "audited"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert ask(cluster, 202).status_code == 200
    finally:
        os.kill(auditor, signal.SIGCONT)
    assert found(cluster, answer)["audit"]["verdict"]["finding"] == "pass"
    assert eventually(lambda: audit(cluster)["problem"] is None, 20)
    assert ask(cluster, 203, **{"x-llmd-assurance": "audited"}).status_code == 200


def test_nothing_is_left(cluster: Cluster) -> None:
    """Runs last: the auditor goes with the pipeline."""
    cluster.interrupt()
    assert eventually(lambda: cluster.left_behind() == ({}, set()), 40), cluster.left_behind()
