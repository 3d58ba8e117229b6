"""Where requests go: near their beginning, away from load, and by nothing that could be read back."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve_app.pipeline.routing import (
    MAX_PROMPT_PAGES,
    MOST_AHEAD,
    PAGE_TOKENS,
    Candidate,
    Prefixes,
    choose,
    homes,
)

CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 99), st.integers(0, 40), st.integers(0, 5), st.integers(0, 9)), min_size=1
)


@given(CANDIDATES)
def test_the_chosen_one_is_never_far_above_the_least_loaded_and_none_as_near_matches_more(
    candidates: list[Candidate],
) -> None:
    chosen, least = choose(candidates), min(c.load for c in candidates)
    assert chosen in candidates and chosen.load <= least + MOST_AHEAD
    near = [c for c in candidates if c.load <= least + MOST_AHEAD]
    assert chosen.matched == max(c.matched for c in near)
    assert all(chosen.load <= c.load for c in near if c.matched == chosen.matched)


def test_a_beginning_draws_its_request_until_that_pipeline_has_too_much_to_do() -> None:
    idle, known = Candidate(0, 0, 0), Candidate(1, MOST_AHEAD, 3)
    assert choose([idle, known]) is known
    assert choose([idle, replace(known, load=MOST_AHEAD + 1)]) is idle


def test_among_equals_all_have_their_turn() -> None:
    """Else every beginning would be computed, and kept, in the first."""
    last, went = [0, 0, 0], Counter[int]()
    for turn in range(1, 10):
        index = choose([Candidate(i, 0, 0, last[i]) for i in range(3)]).index
        last[index] = turn
        went[index] += 1
    assert set(went.values()) == {3}


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
def test_as_much_matches_as_whole_pages_are_the_same_from_the_first_on(first: int, second: int, same: int) -> None:
    prefixes = Prefixes(2)
    one = [*range(same), *range(1000, 1000 + first)]
    other = [*range(same), *range(2000, 2000 + second)]
    prefixes.note(1, prefixes.pages(one, b""))
    pages = prefixes.pages(other, b"")
    assert prefixes.matched(1, pages) == min(same, len(other)) // PAGE_TOKENS
    assert prefixes.matched(0, pages) == 0
    assert prefixes.matched(1, prefixes.pages(one, b"")) == len(one) // PAGE_TOKENS


def test_nothing_is_shared_over_salts_tables_or_what_a_pipeline_has_lost() -> None:
    prompt = list(range(10 * PAGE_TOKENS))
    prefixes, other = Prefixes(1), Prefixes(1)
    pages = prefixes.pages(prompt, b"a")
    prefixes.note(0, pages)
    assert prefixes.matched(0, prefixes.pages(prompt, b"b")) == 0
    assert not set(pages) & set(other.pages(prompt, b"a")), "names can be guessed without the table's key"
    prefixes.forget(0)
    assert prefixes.matched(0, pages) == 0 == len(prefixes)


def test_so_much_is_remembered_and_the_beginning_of_what_was_met_last_stays() -> None:
    prefixes, draw = Prefixes(3, max_pages=50), random.Random(1)
    for _ in range(200):
        prompt = [draw.randrange(50_000) for _ in range(draw.randrange(20 * PAGE_TOKENS))]
        prefixes.note(draw.randrange(3), prefixes.pages(prompt, b""))
        assert len(prefixes) <= 3 * 50
    long = prefixes.pages(range(80 * PAGE_TOKENS), b"")
    prefixes.note(0, long)
    assert prefixes.matched(0, long) == 50
    assert len(prefixes.pages(range((MAX_PROMPT_PAGES + 9) * PAGE_TOKENS), b"")) == MAX_PROMPT_PAGES


def test_every_ingress_tries_the_same_pipelines_for_a_key_and_few_keys_move_with_their_number() -> None:
    keys = [bytes([i, i]) * 16 for i in range(200)]
    assert all(sorted(homes(key, 4)) == [0, 1, 2, 3] for key in keys)
    counts = Counter(homes(key, 4)[0] for key in keys)
    assert min(counts.values()) > 25
    moved = [key for key in keys if homes(key, 4)[0] != homes(key, 5)[0]]
    assert all(homes(key, 5)[0] == 4 for key in moved) and 15 < len(moved) < 70
