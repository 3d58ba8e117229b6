"""Which receipts, heard one after another, convict a session's node."""

from __future__ import annotations

import dataclasses

from serve_app.audit.stories import Stories
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.statement import StatementChain
from shard_tools.signing import Envelope
from tests.serve_app.receipts.pipeline_of_three import Cluster, a_request


def with_statement(bundle: Bundle, stage: int, envelope: Envelope) -> Bundle:
    said = list(bundle.statements)
    said[stage] = envelope
    return dataclasses.replace(bundle, statements=tuple(said))


def retold(cluster: Cluster, stage: int) -> None:
    """From here on this stage signs as if it had said nothing yet."""
    cluster.chains[stage] = StatementChain(cluster.stages[stage])


def test_honest_receipts_convict_nobody_also_when_heard_twice_or_with_gaps() -> None:
    cluster, stories = Cluster(), Stories()
    bundles = [cluster.bundle(a_request(max_tokens=20 + i)) for i in range(8)]
    for i in (0, 1, 1, 5, 3, 4, 7, 0):
        assert stories.heard(bundles[i]) == []


def test_a_session_that_begins_again_is_convicted_by_its_next_receipt() -> None:
    cluster, stories = Cluster(), Stories()
    assert stories.heard(cluster.bundle()) == []
    retold(cluster, 1)
    (proof,) = stories.heard(cluster.bundle(a_request(max_tokens=20)))
    assert proof.convicted() == cluster.nodes[1].key


def test_a_chain_that_parts_is_convicted_by_the_neighbour_in_either_order() -> None:
    for turned in (False, True):
        cluster, stories = Cluster(), Stories()
        first = cluster.bundle()
        retold(cluster, 2)
        cluster.bundle(a_request(max_tokens=20))  # told to somebody else
        second = cluster.bundle(a_request(max_tokens=21))
        one, other = (second, first) if turned else (first, second)
        assert stories.heard(one) == []
        assert [p.convicted() for p in stories.heard(other)] == [cluster.nodes[2].key]


def test_what_nobody_signed_convicts_nobody_and_keeps_nothing_true_out() -> None:
    cluster, stories = Cluster(), Stories()
    true = cluster.bundle()
    said = true.statements[0]
    retold(cluster, 0)
    other = cluster.bundle(a_request(max_tokens=20)).statements[0]
    junk = with_statement(true, 0, dataclasses.replace(other, signature=said.signature))
    assert stories.heard(junk) == []
    assert stories.heard(true) == []
    assert stories.heard(junk) == []
    (proof,) = stories.heard(with_statement(true, 0, other))
    assert proof.convicted() == cluster.nodes[0].key


def test_memory_is_bounded_by_bytes() -> None:
    cluster, stories = Cluster(), Stories(max_bytes=10_000)
    for i in range(40):
        stories.heard(cluster.bundle(a_request(max_tokens=20 + i)))
        assert stories.bytes <= 10_000
    assert stories.bytes > 5_000
