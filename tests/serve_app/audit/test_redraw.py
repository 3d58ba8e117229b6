"""Tokens that were not drawn as the request asked are found by drawing them again, and honest rounding is not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audit.band import FLOOR, DrawBand, calibrate_draws, judge_draws
from serve_app.audit.draw_verdict import DRAW_VERDICT_TYPE, DrawVerdict
from serve_app.audit.error import Rows, floats_of
from serve_app.audit.margin import margin
from serve_app.audit.redraw import Redrawer, margins_of
from serve_app.engine.output_head import OutputHead
from serve_app.engine.penalties import Penalties
from serve_app.engine.sampler import Draw, SequenceDraw
from serve_app.errors import AuditError, ForgedRecordError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.controls import Controls
from serve_app.messages.request import MICRO, FinishedEvent, GenerationRequest, RequestId, Sampling, fresh_salt
from serve_app.receipts.commitment import noise_key
from serve_app.rehearsal import Rehearsed, loader, with_rows
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, SignatureError
from shard_tools.signing import Envelope
from tests.serve_app.audit.redrawn import NOW_MS, asked, band, head, redrawer_of, redrawn
from tests.serve_app.audit.rehearsed import (
    AUDITOR,
    OPTIONS,
    OTHER,
    STAGES,
    answered,
    honest,
    model,
    prompts,
    sharing_house,
)

KEY = bytes(range(8))
RNG = np.random.default_rng


draws = st.builds(
    Draw,
    st.sampled_from([0, 300_000, MICRO, 2 * MICRO]),
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([100_000, 500_000, 900_000, MICRO]),
    st.just(KEY),
    st.sampled_from([0, 50_000, 500_000]),
)


@given(draws, st.integers(0, 10_000), st.sampled_from([0.0, 1e-4, 0.05, 1.0]), st.booleans())
def test_what_rounding_can_do_has_a_margin_of_at_most_twice_that(draw: Draw, n: int, e: float, ties: bool) -> None:
    """Logits that differ by at most e: margin <= 2 e; equal ones: 0. Every edge and tie included."""
    generator = RNG(n)
    logits = generator.normal(0, 2, 48).astype(np.float32)
    if ties:
        logits = np.round(logits)
    moved = logits + generator.uniform(-e, e, 48).astype(np.float32)
    moved = np.clip(moved, logits - np.float32(e), logits + np.float32(e))
    found = margin(draw, logits, n, draw.token(moved, n))
    assert 0 <= found <= 2 * e * (1 + 1e-5) + 1e-6
    assert e or found == 0


@pytest.mark.parametrize(
    ("draw", "token", "expected"),
    [
        (Draw(0, 0, MICRO, KEY), 1, 1.0),  # greedy: the gap
        (Draw(MICRO, 1, MICRO, KEY), 2, 3.0),  # past top-k: up to its edge
        (Draw(MICRO // 2, 1, MICRO, KEY), 2, 3.0),  # in logits, whatever the temperature
        (Draw(MICRO, 0, MICRO, KEY, 500_000), 3, 6.0 - np.log(2)),  # past min-p
    ],
)
def test_past_an_edge_is_as_far_as_the_edge(draw: Draw, token: int, expected: float) -> None:
    logits = np.array([4, 3, 1, -2], np.float32)
    assert margin(draw, logits, favoured(draw, logits, token), token) == pytest.approx(expected)


def test_past_top_p_is_as_far_as_the_weight_before_it_must_shrink() -> None:
    """0.8 lies before it where 0.5 is the edge: their log-odds; or its way to a better one's place, if that is more."""
    logits = np.log(np.array([0.8, 0.19, 0.01])).astype(np.float32)
    draw = Draw(MICRO, 0, 500_000, KEY)
    for token, expected in ((1, np.log(4)), (2, np.log(19))):
        assert margin(draw, logits, favoured(draw, logits, token), token) == pytest.approx(expected, rel=1e-5)


def favoured(draw: Draw, logits: np.ndarray, token: int) -> int:  # type: ignore[type-arg]
    """A position whose noise lifts it above all others, where that counts: then the edge alone keeps it out."""
    free = Draw(draw.temperature_micro, 0, MICRO, KEY)
    return next((p for p in range(100_000) if free.token(logits, p) == token), 0) if draw.temperature_micro else 0


def test_honest_draws_pass_whatever_was_asked_for() -> None:
    """Other prompts than the band's, and each of the sampling's controls."""
    for sampling in (
        Sampling(),
        Sampling(0),
        Sampling(700_000, top_k=20, top_p_micro=900_000),
        Sampling(min_p_micro=50_000, repetition_micro=1_300_000, frequency_micro=500_000),
        Sampling(presence_micro=MICRO, logit_bias=((5, 3 * MICRO), (9, -100 * MICRO))),
    ):
        for one in asked(sampling, None, 3):
            found = redrawn(one)
            assert (found.verdict.finding, found.judgement.differing) == ("pass", 0), sampling


def test_shared_beginnings_and_guesses_are_drawn_from_rows_that_were_signed_for() -> None:
    """Rows of the beginning are another request's; tokens behind guesses come of rows that lie beside void ones."""
    two = (3, 98 * MICRO), (4, 100 * MICRO)  # long runs of one, then of the other: most guesses are right
    house, status = sharing_house(Sampling(seed=4, logit_bias=two))
    assert status["cached_tokens"] == 2 * 32 and 0 < int(str(status["guesses_right"])) < int(str(status["guesses"]))
    for answer in house.answers:
        found = redrawer_of((band(),)).audit(answer.checked, answer.records[-1], NOW_MS)
        assert found.judgement is not None and (found.verdict.finding, found.judgement.differing) == ("pass", 0)


def test_another_seed_in_the_receipt_is_found() -> None:
    """The tokens are those of the seed that was asked for, and of no other."""
    (one,) = answered()
    receipt = one.receipt.receipt
    other = dataclasses.replace(receipt, sampling=dataclasses.replace(receipt.sampling, seed=99))
    lie = dataclasses.replace(one, receipt=dataclasses.replace(one.receipt, receipt=other))
    assert redrawn(one).verdict.finding == "pass" and redrawn(lie).verdict.finding == "sampler"


def test_the_last_token_is_looked_at_too() -> None:
    """No row is made of it, so nothing but two signatures and this bind it."""
    (one,) = answered()
    receipt = one.receipt.receipt
    turned = (*receipt.out_ids[:-1], (receipt.out_ids[-1] + 1) % 500)
    lie = dataclasses.replace(one.receipt, receipt=dataclasses.replace(receipt, out_ids=turned))
    found = redrawer_of((band(),)).audit(lie, one.records[-1], NOW_MS)
    assert (found.verdict.finding, found.verdict.worst, found.verdict.differing) == ("sampler", 13, 1)


def begun_anew(cheat: str | None) -> list[Rehearsed]:
    """Answers that had too few pages: all that were preempted and went on, which one at least must."""

    async def answers() -> list[Rehearsed]:
        limits = LocalLimits(n_pages=8, retain_bytes=1 << 24)
        load = loader(STAGES, {} if cheat is None else {STAGES - 1: cheat})
        pipeline = LocalPipeline(*model(), stages=STAGES, options=OPTIONS, limits=limits, load=load)

        async def one(i: int, prompt: Sequence[int]) -> Rehearsed:
            sampling = Sampling(seed=i, frequency_micro=500_000)
            id, salt = RequestId(f"p{i}"), fresh_salt()
            request = GenerationRequest(id, model()[1].cid, tuple(prompt), 14, sampling, (), b"", salt)
            (*_, last) = [event async for event in pipeline.generate(request)]
            assert isinstance(last, FinishedEvent)
            return with_rows(pipeline, last.receipt)

        try:
            return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts(90, 3)))))
        finally:
            pipeline.close()

    found = [one for one in asyncio.run(answers()) if one.receipt.receipt.attempt]
    assert found
    return found


@pytest.mark.parametrize(("cheat", "finding"), [(None, "pass"), ("other-seed", "sampler")])
def test_of_an_answer_that_was_begun_anew_what_was_drawn_since_is_drawn_again(cheat: str | None, finding: str) -> None:
    """The last stage signs from where on it drew; with penalties, which count what was drawn before as well."""
    judged = 0
    for one in begun_anew(cheat):
        drawn, n_out = one.receipt.statements[-1].drawn, len(one.receipt.receipt.out_ids)
        assert drawn is not None
        first = drawn.first - one.receipt.receipt.n_prompt
        if first == n_out:
            with pytest.raises(AuditError, match="begun anew"):
                redrawn(one)
            continue
        verdict = redrawn(one).verdict
        assert (verdict.first, verdict.tokens) == (first, n_out - first)
        judged += first > 0
        assert verdict.finding == finding or (cheat and verdict.tokens < 3)  # two tokens may be what they would be
        assert verdict.worst >= first
    assert judged


def test_what_cannot_be_drawn_again_gets_no_verdict() -> None:
    """Forged rows, stages that end early, rows that are none of its tokens: nothing is said."""
    (one,) = answered()
    record, checked = one.records[-1], one.receipt
    with pytest.raises(ForgedRecordError):
        redrawn(dataclasses.replace(one, records=(dataclasses.replace(record, sent=bytes(len(record.sent))),)))
    short = dataclasses.replace(checked, statements=checked.statements[:1])
    with pytest.raises(AuditError, match="end at layer 2 of 4"):
        redrawer_of((band(),)).audit(short, one.records[0], NOW_MS)
    for changes, match in (
        ({"out_ids": (1, 2)}, "one less"),
        ({"out_ids": ()}, "one less"),
        ({"sampling": Sampling(logit_bias=((1 << 20, MICRO),))}, "vocabulary"),
    ):
        lie = dataclasses.replace(checked, receipt=dataclasses.replace(checked.receipt, **changes))  # type: ignore[arg-type]
        with pytest.raises(AuditError, match=match):
            redrawer_of((band(),)).audit(lie, record, NOW_MS)


def test_without_a_band_of_both_profiles_a_verdict_says_so_and_nothing_else() -> None:
    """Rows that open what was signed, and a sampler that nobody measured: never a pass. No head is loaded for it."""
    (one,) = answered()
    for bands in (
        (),
        (dataclasses.replace(band(), auditor="x"),),
        (dataclasses.replace(band(), prover="x"),),
        (dataclasses.replace(band(), manifest=Cid.of(Codec.DAG_CBOR, b"another")),),
    ):
        found = redrawer_of(bands).audit(one.receipt, one.records[-1], NOW_MS)
        verdict = found.verdict
        assert (verdict.finding, verdict.band, found.judgement, verdict.tokens) == ("uncalibrated", None, None, 14)
        assert DrawVerdict.open(found.envelope, frozenset((AUDITOR.public,))) == verdict

    def no_head() -> OutputHead:
        raise AssertionError("a head is loaded for nothing")

    Redrawer(model()[1], no_head, (dataclasses.replace(band(), prover="x"),), AUDITOR).audit(
        one.receipt, one.records[-1], NOW_MS
    )


def test_a_token_that_nothing_draws_is_found_and_not_passed_over() -> None:
    """An id of no vocabulary, or logits that are no numbers: honest stages refuse them, so no honest one said that."""
    (one,) = answered()
    receipt = one.receipt.receipt
    lie = dataclasses.replace(receipt, out_ids=(*receipt.out_ids[:-1], 1 << 20))
    found = redrawer_of((band(),)).audit(dataclasses.replace(one.receipt, receipt=lie), one.records[-1], NOW_MS)
    assert (found.verdict.finding, found.verdict.worst) == ("sampler", 13)
    rows = floats_of(one.records[-1].sent, "float32", 64).copy()
    rows[-1] = np.nan
    assert margins_of(receipt, one.receipt.opening, rows, head()).tolist() == [0.0] * 13 + [np.inf]


@pytest.mark.parametrize("repetition_micro", [10_000, 1_300_000, 10 * MICRO])
@pytest.mark.parametrize("temperature_micro", [0, MICRO])
def test_a_penalty_that_stretches_logits_stretches_no_margin(repetition_micro: int, temperature_micro: int) -> None:
    """Rounding of e gives a margin of at most 2 e also where a repetition penalty makes a hundred times e of it."""
    (one,), e, n = answered(), np.float32(0.05), 200
    generator = RNG(repetition_micro + temperature_micro)
    true = generator.normal(3, 0.03, (n, 50)).astype(np.float32)
    moved = np.clip(true + generator.uniform(-e, e, true.shape).astype(np.float32), true - e, true + e)
    sampling = Sampling(temperature_micro, seed=5, repetition_micro=repetition_micro, frequency_micro=1000)
    prompt = tuple(range(10))
    opening = dataclasses.replace(one.receipt.opening, prompt_ids=prompt)
    key = noise_key(sampling, opening.client_nonce, one.receipt.receipt.node_nonce)
    penalties = Penalties(next(iter(Controls.of([(0, sampling, prompt, len(prompt))]))), 50)
    own = SequenceDraw(Draw(temperature_micro, 0, MICRO, key), penalties)
    said = tuple(own.token(row, len(prompt) + i) for i, row in enumerate(moved))
    receipt = dataclasses.replace(one.receipt.receipt, sampling=sampling, n_prompt=len(prompt), out_ids=said)
    found = margins_of(receipt, opening, np.zeros((len(prompt) + n - 1, 64), np.float32), Given(true)).max()
    assert 0 < found <= 2 * e * (1 + 1e-4)
    assert repetition_micro != 10_000 or found * 100 > 20 * e  # in logits that were stretched, it was far


class Given:
    """Implements redraw.py's Head by rows of logits that it was given."""

    profile = "given"

    def __init__(self, logits: np.ndarray) -> None:  # type: ignore[type-arg]
        self._logits, self.vocab_size = logits, logits.shape[1]

    def logits(self, rows: Rows) -> Iterator[np.ndarray]:  # type: ignore[type-arg]
        return iter(self._logits[-len(rows) :])


def test_evidence_adds_up_where_no_token_is_enough() -> None:
    """A liar by so little that every margin is an honest one, but too often; and an honest one, for ever."""
    generator = RNG(3)

    def margins(n: int, often: float) -> np.ndarray:  # type: ignore[type-arg]
        return np.where(generator.random(n) < often, FLOOR + generator.exponential(0.02, n).clip(max=0.15), 0.0)

    made = calibrate_draws(model()[1].cid, "p", "a", [margins(5000, 0.02)])
    found = judge_draws(margins(400, 0.5), made)
    assert found.finding == "sampler" and found.margin < found.limit and 8 < (found.found_at or 0) < 300
    assert [judge_draws(margins(1000, 0.02), made).finding for _ in range(200)] == ["pass"] * 200
    assert np.mean([judge_draws(margins(100, 0.02), made).evidence for _ in range(300)]) <= 1
    one = np.zeros(1000)
    one[700] = 1.0
    assert (judge_draws(one, made).finding, judge_draws(one, made).found_at) == ("sampler", 701)
    one[700] = np.inf
    assert judge_draws(one, made).finding == "sampler"
    assert judge_draws(np.zeros(1000), made).finding == "pass"


def test_a_band_round_trips_and_bad_ones_are_refused() -> None:
    """decode(encode(b)) == b; nothing is calibrated by few draws, or by impossible ones."""
    made = band()
    assert DrawBand.decode(made.encode()) == made
    value = canonical.decode(made.encode(), max_bytes=1 << 10)
    assert isinstance(value, dict)
    for changes in (
        {"draws": 10},
        {"beyond": made.draws + 1},
        {"scale_pico": 0},
        {"largest_pico": -1},
        {"prover": 7},
        {"more": 1},
        {"v": 2},
    ):
        with pytest.raises(FormatError):
            DrawBand.decode(canonical.encode(value | changes))
    for margins, match in (([np.zeros(50)], "too few"), ([], "too few"), ([np.full(300, np.inf)], "impossible")):
        with pytest.raises(AuditError, match=match):
            calibrate_draws(made.manifest, "p", "a", margins)


def test_a_verdict_of_draws_round_trips_and_speaks_for_its_signer_alone() -> None:
    """open(seal(v)) == v; it names who signed for the draws."""
    found = redrawn(honest()[0])
    verdict, keys = found.verdict, frozenset((AUDITOR.public, OTHER.public))
    assert DrawVerdict.open(found.envelope, keys) == verdict
    assert verdict.node == honest()[0].receipt.statements[-1].node
    with pytest.raises(SignatureError):
        DrawVerdict.open(found.envelope, frozenset((OTHER.public,)))
    with pytest.raises(FormatError, match="another key"):
        DrawVerdict.open(Envelope.seal(OTHER, DRAW_VERDICT_TYPE, verdict.encode()), keys)
    for changes in ({"finding": "forged"}, {"band": None}, {"finding": "uncalibrated"}):
        with pytest.raises(FormatError):
            DrawVerdict.decode(dataclasses.replace(verdict, **changes).encode())  # type: ignore[arg-type]
