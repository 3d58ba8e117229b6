"""A draw is a function of logits, sampling, key and position, and has the distribution that was asked for."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.sampler import Draw, gumbel
from serve_app.messages.request import MICRO

KEY = bytes(range(8))
RNG = np.random.default_rng(0)


def probabilities(logits: npt.NDArray[np.float32], draw: Draw) -> npt.NDArray[np.float64]:
    """The distribution that PROTOCOL.md promises, computed the plain way."""
    scaled = logits.astype(np.float64) / (draw.temperature_micro / MICRO)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = order[: draw.top_k] if draw.top_k else order
    weights = np.exp(scaled[kept] - scaled.max())
    if draw.top_p_micro < MICRO:
        reached = np.cumsum(weights) / weights.sum()
        kept = kept[: int(np.argmax(reached >= draw.top_p_micro / MICRO - 1e-12)) + 1]
    out = np.zeros(len(scaled))
    out[kept] = np.exp(scaled[kept] - scaled.max())
    return out / out.sum()


@pytest.mark.parametrize(
    "draw",
    [
        Draw(MICRO, 0, MICRO, KEY),
        Draw(600_000, 0, MICRO, KEY),
        Draw(2 * MICRO, 0, MICRO, KEY),
        Draw(MICRO, 5, MICRO, KEY),
        Draw(MICRO, 0, 800_000, KEY),
        Draw(700_000, 10, 900_000, KEY),
    ],
)
def test_draws_follow_the_exact_distribution(draw: Draw) -> None:
    """Chi-square over 8,000 positions, at most a 1-in-10,000 result."""
    logits = RNG.normal(0, 1.5, 24).astype(np.float32)
    expected = probabilities(logits, draw) * 8_000
    counts = np.bincount([draw.token(logits, position) for position in range(8_000)], minlength=24)
    assert not counts[expected == 0].any()
    seen = expected > 0
    chi2 = float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())
    freedom = int(seen.sum()) - 1
    # Wilson-Hilferty: chi-square to a normal deviate; 3.72 is one in ten thousand.
    deviate = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviate < 3.72


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
