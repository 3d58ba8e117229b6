"""What becomes of stages of quarantined nodes: groups of handles that nobody calls, standings on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.book import StandingBook
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.office import News
from serve_app.audit.verdict import Verdict
from serve_app.cluster.audit_specs import AuditorSpec
from serve_app.cluster.audit_watch import AuditWatch
from serve_app.cluster.pipeline_group import PipelineGroup
from serve_app.cluster.specs import AuditPlan, GroupId, GroupPlan, HeadSpec, Place, Resources
from serve_app.cluster.stage_handle import RayStage
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.identity import NodeIdentity
from serve_app.receipts.statement import StatementChain
from serve_app.receipts.transit import decide
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.signing import PublicKey, Signer
from shard_tools.trust import TrustPolicy
from tests.serve_app.receipts.pipeline_of_three import Cluster, a_request
from tests.serve_app.receipts.test_transit import SENDER, SEQ, receiver, sender

NODES = [NodeIdentity(Signer.from_seed(bytes([i]) * 32)) for i in range(3)]
CID = Cid.of(Codec.DAG_CBOR, b"")


def group_on(nodes: list[int], spares: int = 0, replica: int = 0) -> PipelineGroup:
    """Stages on these nodes; spares are called spare-0 and so on."""
    certificates = tuple(NODES[i].open_session("stage", 1, 0, 60).certificate for i in nodes)
    places = tuple(Place(f"stage-{i}", i) for i in range(len(nodes)))
    waiting = tuple(Place(f"spare-{i}", 9 + i) for i in range(spares))
    plan = GroupPlan(GroupId("0123456789", replica, 1), (), places, waiting, Resources("cpu", 1, 0, 1), "float32")
    spec: Any = HeadSpec(
        plan=plan,
        epoch=1,
        manifest=CID,
        n_stages=len(nodes),
        context_length=1,
        vocab_size=1,
        n_pages=1,
        page_size=16,
        max_step_tokens=1,
        max_requests=1,
        take_turns=False,
        max_waiting=1,
        prefix_cache=False,
        speculate=0,
        certificates=certificates,
        registry=certificates[0],
        state_dir=Path("/"),
        session_lifetime_s=60,
        audit=AuditPlan(0, True, 1 << 20, 8),
    )
    handles = tuple(RayStage(object()) for _ in nodes)
    return PipelineGroup(spec, places[0], handles, tuple(RayStage(object()) for _ in waiting), None, None)


def watch(path: Path, forged: PublicKey | None, fault: PublicKey | None = None, **spares: int) -> AuditWatch:
    """One that has heard of these. spares: on which node each is; one that is not named has not said."""
    book = StandingBook(path / "standing")
    for node, finding in ((forged, "forged"), (fault, "fault")):
        if node is not None:
            known = None if finding == "forged" else CID
            verdict: Any = (CID, bytes(32), 1, node, finding, 0, 0, 0, 1, 0, 0, 9, known, node, 0, 0)
            book.judged(Verdict(*verdict), "operator")
    watch = AuditWatch()
    watch._book = book
    watch._spare_nodes = {name.replace("_", "-"): NODES[i].key for name, i in spares.items()}
    return watch


def test_nothing_is_replaced_while_nobody_is_quarantined(tmp_path: Path) -> None:
    """A suspect's answers are all audited, and it serves on."""
    own = watch(tmp_path, None, NODES[1].key, spare_0=2)
    group = group_on([0, 1], 1)
    assert own.to_replace(group) == (group, frozenset())
    assert own.state(group)["watched"] == [1] and own.state(group)["quarantine_problem"] is None
    unaudited = replace(group, spec=replace(group.spec, audit=None))
    assert own.state(unaudited) == {} and own.to_replace(unaudited) == (unaudited, frozenset())


def test_a_quarantined_nodes_stages_go_to_spares_of_other_nodes_alone(tmp_path: Path) -> None:
    """Two stages and one clean spare: one moves, the other when there is another spare."""
    own = watch(tmp_path, NODES[1].key, spare_0=1, spare_1=2)
    group = group_on([1, 0, 1], 3)  # the third spare has not said where it is
    left, names = own.to_replace(group)
    assert names == {"stage 0"} and [place.actor for place in left.spec.plan.spares] == ["spare-1"]
    assert left.spares == (group.spares[1],) and left.stages == group.stages


@pytest.mark.parametrize("spares", [{}, {"spare_0": 1}])
def test_where_no_spare_is_elsewhere_it_is_said_and_nothing_is_torn_down(
    tmp_path: Path, spares: dict[str, int]
) -> None:
    """One node holds every stage: again and again the same answer, and no repair."""
    own = watch(tmp_path, NODES[1].key, **spares)
    group = group_on([1, 1], len(spares))
    for _ in range(3):
        assert own.to_replace(group) == (group, frozenset())
    assert "stage 0, stage 1 run on quarantined nodes and go on" in str(own.state(group)["quarantine_problem"])
    assert own._book is not None
    own._book.readmit(NODES[1].key)
    assert own.to_replace(group) == (group, frozenset()) and own.state(group)["quarantine_problem"] is None
    assert own.state(group)["watched"] == [0, 1]  # on probation


def test_a_sampler_that_was_found_is_loud_and_costs_nobody_standing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was the last stage or the Head, and nothing says which. What is uncalibrated says nothing."""
    own, auditor = watch(tmp_path, None), Signer.from_seed(b"a" * 32)
    book = own._book
    assert book is not None
    node = NODES[0].key
    for i, finding in enumerate(("sampler", "suspect", "pass", "uncalibrated")):
        known = None if finding == "uncalibrated" else CID
        numbers: Any = (10**15, 14, 3, 13, 10**13, 10**12, known, auditor.public, 1, 1)
        verdict = DrawVerdict(CID, CID, bytes(32), (node, NODES[1].key), finding, *numbers)  # type: ignore[arg-type]
        sealed = canonical.encode(verdict.seal(auditor).to_value())
        caplog.clear()
        own._hear(book, News(i + 1, node, 0, sealed, "", False), auditor.public)
        assert [r.levelname for r in caplog.records] == ["ERROR"] * (finding == "sampler")
    assert book.state() == [] and book.read_to == 4


def test_a_proof_of_two_stories_quarantines_whoever_brings_it(tmp_path: Path) -> None:
    """It is the node's own word; and news that calls itself a proof and is none convicts nobody."""
    own, cluster = watch(tmp_path, None), Cluster()
    book = own._book
    assert book is not None
    node = cluster.nodes[1].key
    one = cluster.bundle().statements[1]
    cluster.chains[1] = StatementChain(cluster.stages[1])
    other = cluster.bundle(a_request(max_tokens=20)).statements[1]
    proof = Equivocation.of(cluster.stages[1].certificate, one, other)
    assert proof is not None
    junk = replace(proof, second=replace(proof.second, signature=bytes(64)))
    own._hear(book, News(1, node, 1, b"", "two stories", False, junk.encode()), node)
    assert book.of(node).serves and book.read_to == 1
    own._hear(book, News(2, node, 1, b"", "two stories", False, proof.encode()), node)
    assert not book.of(node).serves and book.quarantined() == {node}


def test_a_proof_about_rows_on_their_way_quarantines_once(tmp_path: Path) -> None:
    """A node that the operator has readmitted is not convicted again by what it was convicted by before."""
    own = watch(tmp_path, None)
    book = own._book
    assert book is not None
    blame = decide(SEQ, sender(b"f" * 32), receiver())
    assert blame is not None and blame.proof is not None
    proof, folder = blame.proof.encode(), tmp_path / "transit"
    own._convict(book, folder, [b"junk", proof[:-1], proof])
    assert book.quarantined() == {SENDER.node} and [f.read_bytes() for f in folder.iterdir()] == [proof]
    assert "delivered other rows" in book.of(SENDER.node).reason
    book.readmit(SENDER.node)
    own._convict(book, folder, [proof])
    assert book.of(SENDER.node).serves


def test_the_standing_of_a_node_is_one_for_all_pipelines_and_each_is_told_of_its_own_stages(tmp_path: Path) -> None:
    own = watch(tmp_path, NODES[1].key)
    bad, good = group_on([0, 1]), group_on([0, 2], replica=1)
    for _ in range(2):
        for group in (bad, good):
            assert own.to_replace(group) == (group, frozenset())
        assert "stage 1 run on" in str(own.state(bad)["quarantine_problem"])
        assert own.state(good)["quarantine_problem"] is None


def test_one_auditor_does_for_all_pipelines_of_a_version_and_none_of_another() -> None:
    cid, key = CID, NODES[0].key
    spec = AuditorSpec(
        cid, cid, TrustPolicy.any_of([key]), Path("/s"), (), (), 1, Path("/"), key, None, "0123456789", 7
    )
    assert spec.is_like(replace(spec, number=8))
    assert not any(spec.is_like(replace(spec, **other)) for other in ({"version": "abcdefabcd"}, {"threads": 2}))
