"""A stage whose bits depend on nothing else is held to them: every honest way to compute a row gives it, no other."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from serve_app.audit.auditor import Audited, Auditor
from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.exact import ExactReplay
from serve_app.audit.exactness import NOT_FIXED, PROFILE, UNKNOWN, Exactness, exactness
from serve_app.audit.redraw import Redrawer
from serve_app.audit.standing import Standing, State, after_verdict
from serve_app.audit.verdict import Verdict
from serve_app.engine.dishonest import DISHONEST
from serve_app.engine.dishonest_faint import FAINT
from serve_app.errors import AuditError, OverloadedError, RequestError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.record import StageRecord
from serve_app.messages.request import MICRO, FinishedEvent, GenerationRequest, RequestId, Sampling
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.rows import Boundary, RowTree
from serve_app.receipts.statement import StageStatement
from serve_app.rehearsal import Rehearsed
from shard_tools.signing import Envelope
from tests.serve_app.audit.redrawn import band, head, redrawer_of
from tests.serve_app.audit.rehearsed import (
    AUDITOR,
    FIXED,
    OTHER,
    REPLAY,
    STAGES,
    answered,
    auditor,
    exact_auditor,
    exact_house,
    fixed,
    model,
    prompts,
)

Roots = list[tuple[bytes, bytes]]
PAGED = dataclasses.replace(FIXED, page_size=16)


def audited(one: Rehearsed, stage: int, record: StageRecord | None = None, *, exactly: bool = True) -> Audited:
    shown = record or one.records[stage]
    return exact_auditor().audit(one.statements[stage], shown, OTHER.public, 9, exactly=exactly)


def findings(one: Rehearsed) -> list[str]:
    return [audited(one, stage).verdict.finding for stage in range(STAGES)]


def signing(one: Rehearsed, stage: int, sent: bytes, **changes: Any) -> tuple[Envelope, StageRecord]:
    """What the stage signs for and shows if it sends these rows instead."""
    said = one.receipt.statements[stage]
    dtype = changes.pop("dtype", "float32")
    tree = RowTree(Boundary(said.manifest, said.stop, dtype, model()[1].hidden_size))
    tree.append(0, sent)
    lie = dataclasses.replace(said, out_root=tree.root(), **changes)
    return Envelope("", lie.encode(), said.node, bytes(64)), StageRecord(one.records[stage].received, sent)


def test_honest_stages_are_equal_and_the_verdict_says_so() -> None:
    """Without a calibration, whatever level was asked for; it round-trips, and counts for a node as a pass does."""
    one = fixed()
    assert findings(one) == ["equal", "equal"]
    found = audited(one, 1, exactly=False)
    assert (found.verdict.finding, found.verdict.tokens, found.judgement) == ("equal", found.verdict.rows, None)
    assert Verdict.open(found.envelope, frozenset((AUDITOR.public,))) == found.verdict
    heavy = dataclasses.replace(Standing(), evidence={"a": 5000.0})
    assert after_verdict(heavy, found.verdict, "a").evidence["a"] == pytest.approx(2500)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("cheat", sorted(FAINT))
def test_what_hides_inside_the_rounding_is_unequal(cheat: str, stage: int) -> None:
    """By tolerance it passes; by bits the stage is blamed, and no other. One owner's word alone never quarantines."""
    one = fixed(cheat, stage)
    expected = ["equal", "equal"]
    expected[stage] = "unequal"
    assert findings(one) == expected
    verdict = audited(one, stage).verdict
    assert Verdict.decode(verdict.encode()) == verdict and verdict.tokens == 1
    standing = after_verdict(Standing(), verdict, "an owner")
    assert standing.state is State.SUSPECT and "other bits" in standing.reason
    assert after_verdict(standing, verdict, "another").state is State.QUARANTINED
    tolerant = dataclasses.replace(one.receipt.statements[stage], profile=answered()[0].receipt.statements[0].profile)
    envelope = Envelope("", tolerant.encode(), OTHER.public, bytes(64))
    assert auditor().audit(envelope, one.records[stage], OTHER.public, 9).verdict.finding == "pass"


@pytest.mark.parametrize("cheat", sorted(DISHONEST))
def test_what_errs_by_more_is_unequal_all_the_more(cheat: str) -> None:
    assert findings(fixed(cheat, 1)) == ["equal", "unequal"]


def test_the_first_unequal_position_is_named() -> None:
    """One bit of one row; the sign of a zero counts; rows of another dtype than the profile says are all unequal."""
    one = fixed()
    sent = bytearray(one.records[1].sent)
    sent[7 * 256 + 3] ^= 1
    found = exact_auditor().audit(*signing(one, 1, bytes(sent)), OTHER.public, 9, exactly=True).verdict
    assert (found.finding, found.first, found.tokens, found.node) == (
        "unequal",
        7,
        1,
        one.receipt.statements[1].node,
    )
    nan = np.full(len(sent) // 4, np.nan, "<f4").tobytes()
    assert exact_auditor().audit(*signing(one, 1, nan), OTHER.public, 9).verdict.first == 0
    short = np.zeros(len(one.records[0].sent) // 4, "<f2").tobytes()
    assert exact_auditor().audit(*signing(one, 0, short, dtype="float16"), OTHER.public, 9).verdict.finding == "unequal"


def test_rows_that_do_not_open_are_forged_here_too() -> None:
    record = fixed().records[1]
    flipped = StageRecord(record.received, bytes([record.sent[0] ^ 1]) + record.sent[1:])
    assert audited(fixed(), 1, flipped).verdict.finding == "forged"


def test_nothing_is_said_of_bits_of_another_profile() -> None:
    """An honest stage of another processor is not accused, and a promise that cannot be judged is no pass."""
    one, profile = fixed(), fixed().receipt.statements[1].profile.replace("windows of", "other windows of")
    lie, record = signing(one, 1, one.records[1].sent, profile=profile)
    with pytest.raises(AuditError, match="signed for bits of"):
        exact_auditor().audit(lie, record, OTHER.public, 9, exactly=True)
    assert exact_auditor().audit(lie, record, OTHER.public, 9).verdict.finding == "uncalibrated"
    with pytest.raises(AuditError, match="cannot repeat them"):
        Auditor(*model(), REPLAY, (), AUDITOR).audit(one.statements[1], one.records[1], OTHER.public, 9, exactly=True)
    (plain,) = answered()
    assert audited(plain, 1, exactly=False).verdict.finding == "pass"  # of a pipeline that is not deterministic


def served(limits: LocalLimits, order: list[int], tokens: int, together: bool) -> tuple[dict[int, Roots], Any]:
    """By request, what each stage received and sent; and what the scheduler did."""

    async def serve() -> tuple[dict[int, Roots], Any]:
        pipeline = LocalPipeline(*model(), stages=STAGES, options=PAGED, limits=limits)

        async def ask(i: int) -> Roots:
            # Three in four share a beginning of two pages; i alone decides ids and noise.
            beginning = [5 + k for k in range(32)] if i % 4 else []
            ids = (*beginning, *prompts(i, 1)[0])
            # Two say one word again and again, so that they are guessed.
            sampling = Sampling(seed=i, logit_bias=((7, 100 * MICRO),) if i in (2, 6) else ())
            asked = GenerationRequest(RequestId(f"{i}"), model()[1].cid, ids, tokens, sampling, (), b"", bytes(32))
            (*_, last) = [event async for event in pipeline.generate(asked)]
            assert isinstance(last, FinishedEvent)
            bundle = Bundle.decode(last.receipt)
            said = [StageStatement.decode(s.payload) for s in bundle.statements]
            assert Receipt.decode(bundle.receipt.payload).attempt == said[0].attempt
            return [(s.in_root, s.out_root) for s in said]

        try:
            if together:
                found = await asyncio.gather(*map(ask, order))
            else:
                found = [await ask(i) for i in order]
            (status,) = pipeline.status()["pipelines"]  # type: ignore[misc]
            return dict(zip(order, found, strict=True)), status
        finally:
            pipeline.close()

    return asyncio.run(serve())


@pytest.mark.slow
def test_every_honest_way_gives_the_same_rows() -> None:
    """Alone or side by side, in small steps, begun anew for want of pages, behind shared beginnings, guessed.

    Roots have no request in them, so equal rows are equal roots. Eight requests of up to 82 rows.
    """
    requests = list(range(8))
    alone, _ = served(LocalLimits(), requests, 40, False)
    for seed, limits, wanted in (
        (1, LocalLimits(max_running=8), None),
        (2, LocalLimits(max_running=3, max_step_tokens=5), None),
        (3, LocalLimits(max_running=8, max_step_tokens=23, n_pages=14), "preemptions"),
        (4, LocalLimits(max_running=2, prefix_cache=True), "cached_tokens"),
        (5, LocalLimits(max_running=3, prefix_cache=True, n_pages=14, speculate=8, max_step_tokens=40), "guesses"),
    ):
        order = np.random.default_rng(seed).permutation(requests).tolist()
        found, status = served(limits, order, 40, True)
        assert found == alone, limits
        assert wanted is None or status[wanted] > 0, status


def test_exact_answers_are_promised_where_all_compute_alike_and_refused_elsewhere() -> None:
    """For good where bits differ or are not fixed, for now where somebody has not said yet."""
    stages: Any = [{"profile": "p"}, {"profile": "p"}]
    exactness(stages, {"auditor": {PROFILE: "p"}}).require()
    silent: list[tuple[Any, Any]] = [
        ([], {"auditor": {}}),
        (stages, {}),
        (stages, {"auditor": {PROFILE: ""}}),
        ([{}], {"auditor": {PROFILE: "p"}}),
    ]
    for said in silent:
        with pytest.raises(OverloadedError):
            exactness(*said).require()
    with pytest.raises(RequestError, match="a stage computes by 'p' and its auditor by 'q'"):
        exactness(stages, {"auditor": {PROFILE: "q"}}).require()
    with pytest.raises(RequestError, match=r"pipeline\.deterministic"):
        NOT_FIXED.require()
    with pytest.raises(OverloadedError):
        UNKNOWN.require()
    Exactness(None).require()


def redrawer() -> Redrawer:
    return Redrawer(model()[1], head, (band(),), AUDITOR, ExactReplay(*model(), FIXED).head())


def test_tokens_of_a_deterministic_pipeline_are_drawn_again_to_the_bit() -> None:
    """Without a band. A token that was turned is the first unequal one, however near its logits came."""
    one = fixed()
    found = redrawer().audit(one.receipt, one.records[-1], 9)
    assert (found.verdict.finding, found.verdict.band, found.verdict.differing) == ("equal", None, 0)
    assert DrawVerdict.open(found.envelope, frozenset((AUDITOR.public,))) == found.verdict
    receipt = one.receipt.receipt
    turned = (*receipt.out_ids[:3], receipt.out_ids[3] ^ 1, *receipt.out_ids[4:])
    lie = dataclasses.replace(one.receipt, receipt=dataclasses.replace(receipt, out_ids=turned))
    verdict = redrawer().audit(lie, one.records[-1], 9).verdict
    assert (verdict.finding, verdict.worst, verdict.differing) == ("unequal", 3, 1) and verdict.accuses
    assert "unequal: token 4 of 14" in verdict.summary


def test_tokens_of_another_profile_are_drawn_again_by_a_band_or_not_at_all() -> None:
    (plain,) = answered()
    assert redrawer().audit(plain.receipt, plain.records[-1], 9).verdict.finding == "pass"
    house = exact_house()
    answer = house.answers[0]
    assert redrawer().audit(answer.checked, answer.records[-1], 9).verdict.finding == "equal"
    with pytest.raises(AuditError, match="not known here to the bit"):
        redrawer_of((band(),)).audit(answer.checked, answer.records[-1], 9)


def test_the_profile_of_an_auditor_is_that_of_the_stages() -> None:
    assert ExactReplay(*model(), FIXED).profile == fixed().receipt.statements[0].profile
    assert fixed().receipt.statements[0].profile == fixed().receipt.statements[1].profile
