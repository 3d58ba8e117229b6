"""A draw is a function of logits, sampling, key and position, and has the distribution that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.sampler import Draw, SequenceDraw, gumbel, opened_draws
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.controls import Controls
from serve_app.messages.request import MICRO, Sampling
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
from tests.serve_app.engine import sampling_rule as rule
from tests.serve_app.engine.test_philox import KNOWN, words

KEY = bytes(range(8))
PROMPT, DRAWN = (3, 3, 9, 14, 1), (9, 2, 2, 2, 17)


Sampler = Callable[[int], int]  # position -> token


def sampler(asked: Sampling, logits: npt.NDArray[np.float32], key: bytes = KEY) -> Sampler:
    """The engine's, of a sequence that has drawn DRAWN after PROMPT and keeps standing there."""
    opens = np.zeros(1, OPEN)
    opens[0] = (7, [0] * 32, list(key), asked.temperature_micro, asked.top_k, asked.top_p_micro, 0, 0)
    controls = Controls.of([(7, asked, [*PROMPT, *DRAWN], len(PROMPT))])
    nothing = (np.zeros(0, SPAN), np.zeros(0, "<u4"), np.zeros(0, CLOSE), np.zeros(0, "<u8"))
    plan = StepPlan(1, 0, opens, *nothing, controls)
    return lambda position: opened_draws(plan, len(logits))[7].token(logits, position)


def deviate(draw: Sampler, logits: npt.NDArray[np.float32], asked: Sampling) -> float:
    """How far 8,000 draws lie from the distribution asked for, in standard deviations; inf if one was impossible.

    Chi-square, to a normal deviate by Wilson and Hilferty.
    """
    expected = np.array(rule.probabilities(logits.tolist(), asked, PROMPT, DRAWN)) * 8_000
    counts = np.bincount([draw(position) for position in range(8_000)], minlength=len(logits))
    if counts[expected == 0].any():
        return math.inf
    seen = expected > 0
    chi2 = float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())
    freedom = int(seen.sum()) - 1
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


# Beyond it lies one result in ten thousand. The draws are functions of KEY and fixed logits: what passes today passes
# for ever, and each way to be wrong below lies beyond it just as surely.
BOUND = 3.72
LOGITS = np.random.default_rng(0).normal(0, 1.5, 24).astype(np.float32)


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(),
        Sampling(600_000),
        Sampling(2 * MICRO),
        Sampling(top_k=5),
        Sampling(top_p_micro=800_000),
        Sampling(700_000, 10, 900_000),
        Sampling(min_p_micro=100_000),
        Sampling(1_500_000, 9, 950_000, min_p_micro=80_000),
        Sampling(presence_micro=1_200_000),
        Sampling(frequency_micro=-400_000),
        Sampling(repetition_micro=1_700_000),
        Sampling(logit_bias=((0, 2 * MICRO), (5, -100 * MICRO), (11, 700_001))),
        Sampling(800_000, 12, 930_000, None, 40_000, 300_000, 250_000, 1_200_000, ((3, MICRO), (20, -MICRO))),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(asked: Sampling) -> None:
    assert deviate(sampler(asked, LOGITS), LOGITS, asked) < BOUND


def gumbel_max(scaled: npt.NDArray[np.float64], noise: Callable[[int, int], float]) -> Sampler:
    return lambda position: int(np.argmax([x + noise(position, i) for i, x in enumerate(scaled)]))


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (Sampling(), gumbel_max(LOGITS, lambda p, i: rule.noise(KEY, p, i >> 1))),  # neighbours share their noise
        (Sampling(), gumbel_max(LOGITS, lambda p, i: rule.noise(KEY, p >> 3, i))),  # so do positions
        (Sampling(), gumbel_max(LOGITS, lambda p, i: -math.log(rule.word(KEY, p, i) / 2**32 + 1e-10))),  # a log short
        (Sampling(), gumbel_max(LOGITS, lambda p, i: -rule.noise(KEY, p, i))),
        (Sampling(600_000), sampler(Sampling(), LOGITS)),  # temperature forgotten
        (Sampling(600_000), gumbel_max(LOGITS / 0.6, lambda p, i: rule.noise(KEY, p, i) / 0.6)),  # or taken twice
        (Sampling(), sampler(Sampling(880_000), LOGITS)),
        (Sampling(top_k=5), sampler(Sampling(top_k=6), LOGITS)),
        (Sampling(top_k=5), sampler(Sampling(top_k=4), LOGITS)),
        (Sampling(top_p_micro=800_000), sampler(Sampling(top_p_micro=840_000), LOGITS)),
        (Sampling(min_p_micro=100_000), sampler(Sampling(min_p_micro=85_000), LOGITS)),
        (Sampling(presence_micro=1_200_000), sampler(Sampling(frequency_micro=1_200_000), LOGITS)),
        (Sampling(frequency_micro=-400_000), sampler(Sampling(frequency_micro=-300_000), LOGITS)),
        (Sampling(repetition_micro=1_700_000), sampler(Sampling(presence_micro=1_700_000), LOGITS)),
        (Sampling(logit_bias=((1, MICRO),)), sampler(Sampling(logit_bias=((2, MICRO),)), LOGITS)),
    ],
)
@pytest.mark.slow
def test_a_sampler_that_is_a_little_wrong_fails_the_same_test(asked: Sampling, wrong: Sampler) -> None:
    """So passing it says something."""
    assert deviate(wrong, LOGITS, asked) > BOUND


ranges = st.builds(
    Sampling,
    st.sampled_from([0, 1, 300_000, MICRO, 2 * MICRO]),
    st.sampled_from([0, 1, 7, 40, 300]),
    st.sampled_from([1, 500_000, 990_000, MICRO]),
    st.none(),
    st.sampled_from([0, 1, 20_000, 500_000, MICRO]),
    st.sampled_from([0, 0, 1, 700_000, -2 * MICRO]),
    st.sampled_from([0, 0, 333_333, -MICRO]),
    st.sampled_from([MICRO, MICRO, 1_300_000, 700_001, 10 * MICRO]),
    st.dictionaries(
        st.integers(0, 299), st.sampled_from([1, -100 * MICRO, 100 * MICRO, 999_999, -5 * MICRO]), max_size=5
    ).map(lambda biases: tuple(sorted(biases.items()))),
)


@settings(max_examples=150, deadline=None)
@given(ranges, st.integers(0, 1 << 30), st.sampled_from([8, 10_000]), st.integers(0, (1 << 31) - 1))
def test_every_control_is_drawn_as_the_protocol_says(asked: Sampling, seed: int, levels: int, position: int) -> None:
    """Token for token as the page written a second time. Few levels: ties."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels, 300) * (8 / levels)).astype(np.float32)
    expected = rule.token(logits.tolist(), asked, KEY, position, PROMPT, DRAWN)
    assert sampler(asked, logits)(position) == expected


def test_what_is_drawn_counts_from_then_on() -> None:
    """A sequence that goes on, and one that is opened again with all its tokens, go on alike."""
    asked = Sampling(0, frequency_micro=MICRO, logit_bias=((4, -MICRO),))
    logits, opens, tokens = np.zeros(8, np.float32), np.zeros(1, OPEN), [0, 5]
    nothing = (np.zeros(0, SPAN), np.zeros(0, "<u4"), np.zeros(0, CLOSE), np.zeros(0, "<u8"))

    def opened(tokens: list[int]) -> SequenceDraw:
        opens["top_p_micro"] = MICRO
        return opened_draws(StepPlan(1, 0, opens, *nothing, Controls.of([(0, asked, tokens, 2)])), 8)[0]

    going = opened(tokens)
    for n in range(20):
        again = opened(tokens).token(logits, n)
        tokens = [*tokens, going.token(logits, n)]
        assert tokens[-1] == again
    assert tokens[2:] == [0, 1, 2, 3, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4]


def test_a_draw_one_position_one_id_or_one_key_off_is_another() -> None:
    """Such noise has the right distribution; only its values tell it from the one that was promised."""
    logits = LOGITS.tolist()

    def draws(off: int, of_id: int, key: bytes) -> list[int]:
        noises = ([rule.noise(key, p + off, i + of_id) for i in range(len(logits))] for p in range(1, 60))
        return [max(range(len(logits)), key=lambda i, g=g: logits[i] + g[i]) for g in noises]  # type: ignore[misc]

    drawn = [sampler(Sampling(), LOGITS)(position) for position in range(1, 60)]
    assert drawn == draws(0, 0, KEY)
    for wrong in ((1, 0, KEY), (-1, 0, KEY), (0, 1, KEY), (0, 0, KEY[4:] + KEY[:4]), (0, 0, KEY[::-1])):
        assert sum(a != b for a, b in zip(drawn, draws(*wrong), strict=True)) > 20


def test_the_noise_is_that_of_the_published_generator() -> None:
    """The page's Philox, which test_philox.py holds against Random123's answers for the engine's, has them too."""
    for counter, key, out in KNOWN:
        assert rule.philox(tuple(words(counter)), tuple(words(key))) == tuple(words(out))  # type: ignore[arg-type]
    ids = np.arange(50)
    assert gumbel(KEY, 9, ids).tolist() == pytest.approx([rule.noise(KEY, 9, i) for i in range(50)], rel=1e-14)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    for asked in (Sampling(logit_bias=((24, 5),)), Sampling(presence_micro=1)):
        with pytest.raises(ProtocolError, match="vocabulary"):
            sampler(asked, LOGITS[: 3 if asked.penalises else 24])(0)


def test_a_penalty_never_makes_a_logit_that_is_no_number() -> None:
    with pytest.raises(PipelineError, match="float32's range"):
        sampler(Sampling(repetition_micro=MICRO // 100), np.full(24, 3e38, np.float32))(0)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.array([0, 3, 1, 3], np.float32)
    assert Draw(0, 0, MICRO, KEY).token(logits, 0) == 1


def test_top_k_one_is_greedy_and_ties_go_to_the_lowest_id() -> None:
    logits = np.array([0, 3, 1, 3], np.float32)
    assert {Draw(MICRO, 1, MICRO, KEY).token(logits, p) for p in range(50)} == {1}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.05, 20.0), st.integers(1, 2_000_000), st.integers(0, 5000))
def test_leaving_out_tokens_that_cannot_win_changes_no_draw(
    seed: int, spread: float, temperature_micro: int, position: int
) -> None:
    """Equal to Gumbel-max over the whole vocabulary."""
    logits = np.random.default_rng(seed).normal(0, spread, 3000).astype(np.float32)
    scaled = logits.astype(np.float64) / (temperature_micro / MICRO)
    ids = np.arange(3000)
    assert Draw(temperature_micro, 0, MICRO, KEY).token(logits, position) == int(
        np.argmax(scaled + gumbel(KEY, position, ids))
    )


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_key_and_position_decide_the_noise(a: int, b: int) -> None:
    ids = np.arange(64)
    assert np.array_equal(gumbel(KEY, a, ids), gumbel(KEY, b, ids)) == (a == b)


def test_a_nucleus_wider_than_the_first_sort_is_found_whole() -> None:
    """A flat distribution needs nearly every token; the search grows until it has them."""
    logits = np.zeros(4000, np.float32)
    draws = {Draw(MICRO, 0, 999_000, KEY).token(logits, p) for p in range(3000)}
    assert max(draws) > 3500 and len(draws) > 1500


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    temperature_micro=st.sampled_from([1, 1_000, 300_000, MICRO, 2 * MICRO]),
    top_k=st.sampled_from([0, 1, 7, 64, 599, 600, 1 << 24]),
    top_p_micro=st.sampled_from([1, 500_000, 990_000, 999_999, MICRO]),
    levels=st.sampled_from([2, 12, 10_000]),
)
def test_sorting_few_draws_as_sorting_all_does(
    seed: int, temperature_micro: int, top_k: int, top_p_micro: int, levels: int
) -> None:
    """Top-k and top-p from a whole sort, equals by lowest id, then Gumbel-max: the same token. Few levels: ties."""
    logits = np.random.default_rng(seed).integers(0, levels, 600).astype(np.float32) * np.float32(8 / levels)
    scaled = logits.astype(np.float64) / (temperature_micro / MICRO)
    kept = np.array(sorted(range(600), key=lambda i: (-scaled[i], i))[: top_k or 600])
    weights = np.exp(scaled[kept] - scaled.max())
    if top_p_micro < MICRO:
        total = weights.sum() if top_k else np.exp(scaled - scaled.max()).sum()
        reached = np.cumsum(weights) >= total * (top_p_micro / MICRO)
        kept = kept[: int(np.argmax(reached)) + 1] if reached.any() else kept
    kept = np.sort(kept)
    expected = int(kept[np.argmax(scaled[kept] + gumbel(KEY, 3, kept))])
    draw = Draw(temperature_micro, top_k, top_p_micro, KEY)
    assert [draw.token(logits, 3), draw.token(logits, 3)] == [expected, expected]
