"""What a sequence will draw next, guessed: what followed its last tokens where they stood before, in prompt or answer.

A guess costs a row and is exact all the same: the noise of a draw depends on key and position alone, so what is drawn
behind a right guess is what would have been drawn without it, and what is drawn behind a wrong one is void.

Knows nothing of pages and steps. Whether guessing pays is learnt from every token, guessed at or not: was it what would
have been guessed?
"""

from __future__ import annotations

import collections.abc
import math

from serve_app.messages.step import MAX_GUESSES

# Of a step with guesses. A step of few rows costs the reading of the weights, so more rows are nearly free: on a GPU up
# to some hundred, on a CPU until its arithmetic is what it waits for; its compiled step takes 32.
MAX_GUESSED_ROWS = 32

_LONGEST, _SHORTEST = 4, 2  # tokens that must have stood there before; one alone is followed by anything
_PLACES = 8  # looked at, the latest first
_START, _STEP, _ENOUGH = 0.0, 0.25, 0.5  # three right in a row begin the guessing, three wrong ones end it
_DOUBT = 0.1  # the least chance of being wrong that is reckoned with

Tokens = collections.abc.Sequence[int]


class Guesser:
    """One sequence's index of its own tokens, of which it must be told all, in order."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._known = 0
        self._latest: dict[int, int] = {}  # two tokens -> where the one behind them stands, the last time
        self._earlier: list[int] = []  # by that place: where it was the time before; 0: nowhere
        self._score = _START  # how often it was right of late

    @property
    def pays(self) -> bool:
        """Whether most guesses were right of late."""
        return self._score >= _ENOUGH

    @property
    def run(self) -> int:
        """How many guesses are right at that rate before one is wrong: further ones would cost more than they gain."""
        return max(1, math.ceil(self._score / max(1 - self._score, _DOUBT)))

    def learn(self, tokens: Tokens) -> None:
        """tokens: all so far. Constant work for each that is new."""
        for i in range(self._known, len(tokens)):
            if i >= self._n_prompt:
                place = self._find(tokens, i)
                self._score += _STEP * ((place > 0 and tokens[place] == tokens[i]) - self._score)
            pair = _pair(tokens, i)
            self._earlier.append(self._latest.get(pair, 0))
            if i >= _SHORTEST:
                self._latest[pair] = i
        self._known = len(tokens)

    def guesses(self, tokens: Tokens, most: int) -> list[int]:
        """Up to so many of the tokens that follow `tokens`, all of which are learnt."""
        assert self._known == len(tokens)
        place = self._find(tokens, len(tokens))
        if place == 0:
            return []
        out, period = list(tokens[place : place + most]), len(tokens) - place
        while len(out) < most:  # what has just begun to repeat itself is taken to go on
            out.append(out[len(out) - period])
        return out

    def _find(self, tokens: Tokens, end: int) -> int:
        """Behind which earlier place the tokens before `end` stood too, the most of them; 0: nowhere."""
        best, longest = 0, 0
        place = self._latest.get(_pair(tokens, end), 0)
        for _ in range(_PLACES):
            if place == 0:
                break
            n = _SHORTEST
            while n < _LONGEST and n < place and tokens[place - n - 1] == tokens[end - n - 1]:
                n += 1
            if n > longest:
                best, longest = place, n
                if n == _LONGEST:
                    break
            place = self._earlier[place]
        return best


def _pair(tokens: Tokens, end: int) -> int:
    """The two tokens before `end`, as one number; -1 where there are no two."""
    return tokens[end - 2] << 32 | tokens[end - 1] if end >= _SHORTEST else -1


def room_for_guesses(most: int, sequences: int, max_step_tokens: int) -> int:
    """How many guesses each of so many sequences may make in one step of theirs alone."""
    if not sequences:
        return 0
    return max(0, min(most, MAX_GUESSES, min(MAX_GUESSED_ROWS, max_step_tokens) // sequences - 1))
