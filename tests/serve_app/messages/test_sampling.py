"""How a draw is said in a receipt: one way for each sampling, and none for what changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import RequestError
from serve_app.messages.request import MICRO, Sampling
from shard_tools.errors import FormatError

PLAIN: dict[str, Any] = {"t": 700_000, "k": 0, "p": MICRO, "seed": None}


def test_a_request_without_controls_says_nothing_of_them() -> None:
    """So its commitment, and its receipt, have the bytes that they had before there were any."""
    assert Sampling(700_000).to_value() == PLAIN
    assert Sampling.from_value(PLAIN) == Sampling(700_000)
    assert Sampling(700_000).plain and not Sampling(700_000).penalises


@pytest.mark.parametrize(
    "change",
    [
        {"min_p_micro": 0},
        {"min_p_micro": MICRO + 1},
        {"presence_micro": 0},
        {"presence_micro": 2 * MICRO + 1},
        {"frequency_micro": 0},
        {"frequency_micro": -2 * MICRO - 1},
        {"repetition_micro": MICRO},
        {"repetition_micro": 0},
        {"repetition_micro": None},
        {"logit_bias": []},
        {"logit_bias": [[3, 0]]},
        {"logit_bias": [[3, 100 * MICRO + 1]]},
        {"logit_bias": [[-1, 5]]},
        {"logit_bias": [[1 << 24, 5]]},
        {"logit_bias": [[4, 5], [3, 5]]},
        {"logit_bias": [[3, 5], [3, 6]]},
        {"logit_bias": [[3, 5, 6]]},
        {"logit_bias": [[3, True]]},
        {"logit_bias": [3]},
        {"logit_bias": {"3": 5}},
        {"logit_bias": [[i, 1] for i in range(301)]},
        {"min_tokens": 1},
    ],
)
def test_a_second_way_to_say_it_and_what_is_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Sampling.from_value(PLAIN | change)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("min_p_micro", -1, "min_p"),
        ("presence_micro", 2 * MICRO + 1, "presence_penalty"),
        ("frequency_micro", -2 * MICRO - 1, "frequency_penalty"),
        ("repetition_micro", 0, "repetition_penalty"),
        ("logit_bias", ((5, 0),), "logit_bias"),
        ("logit_bias", ((5, 1), (5, 1)), "logit_bias"),
    ],
)
def test_a_sampling_out_of_range_names_the_field_of_the_request(field: str, value: Any, param: str) -> None:
    with pytest.raises(RequestError) as e:
        Sampling(**{field: value})
    assert e.value.param == param
