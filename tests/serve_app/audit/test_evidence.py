"""What errors, verdicts and draws come to: no model, only numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audit.calibration import fit_tails
from serve_app.audit.draw import Draw, draw, secret_commitment
from serve_app.audit.error import channel_sizes, eased, floats_of, whitened_errors, window_means
from serve_app.audit.standing import (
    CLEARED,
    PASSES,
    STRIKES,
    Standing,
    State,
    after_proof,
    after_refusal,
    after_verdict,
    readmitted,
)
from serve_app.audit.tail import MICRO, fit
from serve_app.audit.verdict import Verdict
from serve_app.errors import AuditError
from shard_tools.cid import Cid, Codec
from shard_tools.signing import PublicKey, Signer

CID = Cid.of(Codec.DAG_CBOR, b"")
KEY = PublicKey(bytes(32))


def said(finding: Any = "pass", evidence: float = 0.6) -> Verdict:
    return Verdict(CID, bytes(32), 0, KEY, finding, 0, round(evidence * MICRO), 0, 1, 0, 0, 9, CID, KEY, 0, 0)


def many(standing: Standing, count: int, owner: str, *what: Any) -> Standing:
    for _ in range(count):
        standing = after_verdict(standing, said(*what), owner)
    return standing


def test_errors_are_relative_per_channel_and_never_quietly_wrong() -> None:
    """A channel a thousand times larger drowns nothing; NaN is infinite; equal is 0, zeros too."""
    rows = np.ones((3, 4), np.float32)
    rows[:, 0] = 1000
    sizes = channel_sizes([rows])
    small = rows.copy()
    small[1, 2] = 1.2
    errors = whitened_errors(small, rows, sizes)
    assert errors[0] == 0 and errors[1] == pytest.approx(0.1)
    small[2, 0] = np.nan
    assert whitened_errors(small, rows, sizes)[2] == np.inf
    assert whitened_errors(rows * 0, rows * 0, channel_sizes([rows * 0])).tolist() == [0, 0, 0]
    assert window_means(np.arange(7.0), 3).tolist() == [1, 4]


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_bfloat16_is_widened_exactly(values: list[float]) -> None:
    """The upper half of a float32 is what it stands for."""
    whole = np.array(values, np.float32).view(np.uint32) & 0xFFFF0000
    rows = (whole >> 16).astype("<u2").tobytes()
    assert floats_of(rows, "bfloat16", 1).reshape(-1).view(np.uint32).tolist() == whole.tolist()


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_a_tail_says_how_often(shape: float) -> None:
    """Of 200,000 new values, those past limit(p) are about p of them; p_value and limit are inverses."""
    generator = np.random.default_rng(1)

    def values(n: int) -> Any:
        u = generator.random(n)
        return 1 + (-np.log(u) if shape == 0 else (u**-shape - 1) / shape)

    tail = fit(1, values(20_000) / 100)
    fresh = values(200_000) / 100
    for p in (1e-1, 1e-2, 1e-3, 1e-4):
        assert (fresh > tail.limit(p)).mean() == pytest.approx(p, rel=0.5)
        assert tail.p_value(tail.limit(p)) == pytest.approx(p, rel=1e-3)
    assert tail.p_value(0.0) == 1.0 and tail.p_value(float("inf")) == 0.0 == tail.p_value(float("nan"))
    below = [tail.p_value(v / 100) for v in values(1000)]
    assert np.quantile(below, 0.3) >= 0.3 and sorted(fresh[:50], reverse=True)  # p-values are no smaller than uniform


def test_a_tail_never_ends_where_the_sample_did() -> None:
    """Of bounded errors, all equal or nearly so, a slightly larger one is rare and not impossible."""
    equal = fit(1, np.full(200, 0.01))
    assert 0 < equal.p_value(0.01 + 1e-12) < 0.1
    assert fit_tails([np.full(50, 0.01)]) == ()
    with pytest.raises(AuditError, match="no number"):
        fit_tails([np.full(200, np.inf)])


def test_evidence_has_a_mean_of_at_most_one() -> None:
    """For p-values that are uniform, as an honest node's are: what the bound on false alarms rests on."""
    from serve_app.audit.verdict import _e_value

    p = np.random.default_rng(2).random(200_000)
    assert np.mean([_e_value(x) for x in p.tolist()]) <= 1.02


def test_one_owners_auditors_never_quarantine() -> None:
    """A thousand faults by one, from however many keys; one more by another does."""
    accused = many(Standing(), 1000, "mallory", "fault", 1e6)
    assert accused.state is State.SUSPECT and accused.serves and accused.audited_always
    assert after_verdict(accused, said("fault"), "alice").state is State.QUARANTINED


def test_a_suspect_is_cleared_by_others_and_not_by_its_accuser() -> None:
    """CLEARED passes by others; the accuser's own count for nothing."""
    accused = many(Standing(), 1, "mallory", "fault")
    assert many(accused, 10 * CLEARED, "mallory").state is State.SUSPECT
    assert many(accused, CLEARED - 1, "alice").state is State.SUSPECT
    assert many(accused, CLEARED, "alice") == Standing(evidence={"alice": pytest.approx(0.6)})


def test_a_slow_drift_adds_up_and_good_behaviour_is_not_saved_up() -> None:
    """Audits of e-value 9 that each pass: SUSPECT at the fifth, after 10,000 honest ones too; two owners convict."""
    for past in (0, 10_000):
        node = many(Standing(), past, "alice")
        assert many(node, 4, "alice", "pass", 9.1).state is State.ACTIVE
        drifting = many(node, 5, "alice", "pass", 9.1)
        assert drifting.state is State.SUSPECT
        assert many(drifting, 5, "bob", "pass", 9.1).state is State.QUARANTINED


def test_honest_nodes_are_seldom_suspected_and_never_quarantined() -> None:
    """100,000 simulated audits by two owners, p-values uniform: one suspicion in 10,000 audits of an owner at most."""
    from serve_app.audit.verdict import _e_value

    generator = np.random.default_rng(3)
    node, suspected = Standing(), 0
    for i, p in enumerate(generator.random(100_000).tolist()):
        was = node.state
        node = after_verdict(node, said("suspect" if p <= 1e-4 else "pass", _e_value(p)), "ab"[i % 2])
        suspected += was is State.ACTIVE and node.state is State.SUSPECT
        assert node.state is not State.QUARANTINED
    assert suspected <= 10


def test_proof_convicts_at_once_and_probation_is_watched() -> None:
    """What anybody can check needs no second auditor; PASSES in a row end a probation, doubt begins it anew."""
    out = after_proof(Standing(), "two statements with one number")
    assert out.state is State.QUARANTINED and not out.serves
    assert many(out, 99, "alice") == out
    back = readmitted(out)
    assert back.state is State.PROBATION and back.audited_always
    doubted = after_verdict(many(back, PASSES - 1, "alice"), said("suspect"), "alice")
    assert many(doubted, PASSES - 1, "alice").state is State.PROBATION
    assert many(doubted, PASSES, "alice").state is State.ACTIVE


def test_refusing_to_open_is_suspicious_after_some_times() -> None:
    """Not a lie: never more than SUSPECT, and forgiven when it opens again."""
    node = Standing()
    for _ in range(STRIKES - 1):
        node = after_refusal(node, "no answer")
    assert node.state is State.ACTIVE
    assert after_verdict(node, said(), "alice").strikes == 0
    for _ in range(99):
        node = after_refusal(node, "no answer")
    assert node.state is State.SUSPECT


SECRET = b"s" * 32


def drawn(i: int) -> Draw:
    return draw(Cid.of(Codec.DAG_CBOR, b"%d" % i), SECRET, secret_commitment(SECRET), hashlib.sha256(b"head").digest())


def test_draws_are_even_and_do_not_depend_on_each_other() -> None:
    """Stage, and whether at all, over 10,000 receipts: within five standard deviations."""
    draws = [drawn(i) for i in range(10_000)]
    stages = np.bincount([d.stage(4) for d in draws], minlength=4)
    audits = np.array([d.audits(250_000) for d in draws])
    assert np.abs(stages - 2500).max() < 5 * 43.3 and abs(audits.sum() - 2500) < 5 * 43.3
    both = audits & (np.array([d.stage(4) for d in draws]) == 0)
    assert abs(both.sum() - 625) < 5 * 24.2


def test_who_tells_another_secret_is_refused() -> None:
    """Else whoever draws could choose among secrets once it has seen the log head."""
    with pytest.raises(AuditError, match="committed"):
        draw(CID, b"t" * 32, secret_commitment(SECRET), bytes(32))


def test_auditors_are_of_different_owners_and_none_judges_its_own() -> None:
    """The same for whoever repeats the draw, in whatever order candidates come."""
    keys = [(Signer.from_seed(bytes([i]) * 32).public, owner) for i, owner in enumerate(["x", "x", "y", "z", "z"])]
    for i in range(50):
        chosen = drawn(i).auditors(keys, "x", 2)
        assert chosen == drawn(i).auditors(keys[::-1], "x", 2)
        assert {dict(keys)[k] for k in chosen} == {"y", "z"}
    with pytest.raises(AuditError, match="2 auditors"):
        drawn(0).auditors(keys, "y", 3) if len({o for _, o in keys}) > 3 else drawn(0).auditors(keys[:3], "y", 2)


def test_an_error_counts_less_by_how_much_more_than_usual_its_row_carries_rounding() -> None:
    errors, nudged = np.array([3.0, 3.0, 3.0, np.inf, 3.0]), np.array([0.5, 1.0, 4.0, 4.0, np.inf])
    assert eased(errors, nudged, 2.0).tolist() == [3, 3, 1.5, np.inf, 0]
