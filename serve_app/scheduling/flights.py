"""How many steps are on their way at a time, and how far ahead of its tokens a sequence runs."""

from __future__ import annotations


def max_flights(stages: int, take_turns: bool = False) -> int:
    """Steps on their way at a time: one more than stages keeps each busy while tokens travel back.

    take_turns: all stages compute on the same cores. Then one step of all sequences is faster than several of few, each
    of which reads the weights again: two stages give what one gives, and half of it with three steps on their way.
    """
    return 1 if take_turns and stages > 1 else stages + 1 + lookahead(stages) // 2


def flights_ahead(stages: int) -> int:
    """As max_flights, of several stages of which the first learns of tokens without the Head.

    Each of the micro-batches has a step running and the next one planned.
    """
    return 2 * stages


def lookahead(stages: int) -> int:
    """For a pipeline of so many stages. Two tokens ahead hide the Head even where a step takes a millisecond."""
    return 2 if stages == 1 else 0
