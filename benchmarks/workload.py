"""Who asks what, and when: drawn from a seed, so that every server is asked the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_TEXT = (
    "river stone cloud paper garden winter engine letter window bridge market silver forest doctor music ocean "
    "family island summer number village story answer machine morning picture travel history question science"
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load. prompt: text; about one token a word."""

    at_s: float  # after the start
    prompt: str
    answer_tokens: int  # at most


def lengths(text: str) -> Callable[[random.Random], int]:
    """A distribution: `64`, `20-200` (uniform) or `60~0.8<400` (log-normal: median, sigma, largest).

    Raises ValueError.
    """
    if "~" in text:
        median, rest = text.split("~")
        sigma, largest = rest.split("<")
        middle, spread, top = float(median), float(sigma), int(largest)
        return lambda draw: max(1, min(top, round(middle * draw.lognormvariate(0, spread))))
    low, _, high = text.partition("-")
    first, last = int(low), int(high or low)
    if not 1 <= first <= last:
        raise ValueError(f"{text!r} is no range of lengths")
    return lambda draw: draw.randint(first, last)


def poisson(rate_per_s: float | None, n: int, prompts: str, answers: str, seed: int) -> list[Arrival]:
    """n requests whose gaps are exponential with mean 1 / rate; None: all at once. Equal arguments, equal requests.

    The requests are the same at every rate; only when they come differs.
    """
    draw, clock = random.Random(seed), random.Random(f"{seed}/gaps")
    prompt_words, answer_tokens = lengths(prompts), lengths(answers)
    at, out = 0.0, []
    for i in range(n):
        words = " ".join(draw.choice(WORDS) for _ in range(prompt_words(draw)))
        prompt = f"Number {i}. Write a long story in which these words occur: {words}."
        out.append(Arrival(at, prompt, answer_tokens(draw)))
        at += clock.expovariate(rate_per_s) if rate_per_s is not None else 0.0
    return out
