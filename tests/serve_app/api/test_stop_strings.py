"""Stop strings, wherever tokens cut them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.api.stop_strings import StopScanner
from tests.serve_app.api.stop_definition import whole

texts = st.text(alphabet="abc", max_size=40)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


@given(texts, stop_lists, st.lists(st.integers(0, 40), max_size=12))
@example("aab", ["aab", "ab"], [1, 2])
@example("abc", ["abc", "b"], [])
def test_what_comes_out_does_not_depend_on_how_the_text_was_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    out, expected = "", whole(text, stops)
    for start, stop in pairwise(edges):
        out += scanner.push(text[start:stop])
        assert expected[0].startswith(out), "text was let out that is part of a stop string"
    out += scanner.finish()
    assert (out, scanner.matched) == expected


def test_text_is_not_held_back_without_need() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("hello E") == "hello "
    assert scanner.push("x") == "Ex"
    assert scanner.push("EN") == ""
    assert scanner.finish() == "EN"
