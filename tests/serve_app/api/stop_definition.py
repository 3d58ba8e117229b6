"""What a stop string means, said as slowly and plainly as possible."""

from __future__ import annotations


def whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """The answer by the definition: read character by character until some stop string is complete."""
    for stop_at in range(1, len(text) + 1):
        ends = [s for s in stops if text[:stop_at].endswith(s)]
        if ends:
            return text[: stop_at - max(map(len, ends))], True
    return text, False
