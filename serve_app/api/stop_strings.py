"""Finds stop strings in text that arrives in pieces, without ever letting part of one out.

Law: what comes out does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on until one of `stops` has appeared; the answer ends just before it.

    The stop string that is complete first counts; of those complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every answer at once"
        self._stops = tuple(stops)
        self._held = ""  # the end of the text so far, which may turn out to be the beginning of a stop string
        self.matched = False

    def push(self, piece: str) -> str:
        """The text that is certainly part of the answer, now that `piece` has come. Empty once matched."""
        if self.matched or not self._stops:
            return "" if self.matched else piece
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
