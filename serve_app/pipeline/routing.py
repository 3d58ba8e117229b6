"""Which of several pipelines of one model a request goes to. Pure: no clock, no I/O.

To the one that was sent the longest part of its beginning lately, since it may hold the keys and values of that; but
not if it has clearly more to do than another. Kept of a prompt are keyed hashes of its pages, so many and no more:
nothing here can be read back, or guessed without the key.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_TOKENS = 32  # two of the Head's pages: a shorter beginning is computed as fast as it is looked for
MAX_PAGES = 1 << 15  # for each pipeline: a million tokens, 5 MB; more than most hold KV of
MAX_PROMPT_PAGES = 1 << 10  # of one prompt: 32,768 tokens are hashed in 1 ms, in which the ingress does nothing else
MOST_AHEAD = 8  # requests that a pipeline may have more than the least loaded, and still be given one for its beginning
_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pipeline that takes requests in."""

    index: int
    load: int  # requests
    matched: int  # pages of the request's beginning that it was sent
    last: int = 0  # when it was chosen last: larger is later


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best of these. Law: its load is at most MOST_AHEAD above the least; of those, none matches more."""
    least = min(candidate.load for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.load <= least + MOST_AHEAD]
    return min(near, key=lambda candidate: (-candidate.matched, candidate.load, candidate.last))


def homes(key: bytes, pipelines: int) -> list[int]:
    """All of them in the order in which each ingress tries them for this Idempotency-Key, so that a retry finds it.

    One more or one fewer changes the first for few keys (rendezvous hashing: Thaler and Ravishankar 1998).
    """
    return sorted(range(pipelines), key=lambda i: hashlib.sha256(key + i.to_bytes(4, "big")).digest())


class Prefixes:
    """Which beginnings each pipeline was sent lately."""

    def __init__(self, pipelines: int, max_pages: int = MAX_PAGES) -> None:
        """max_pages: of each; those not met for longest go first, the end of a prompt before its beginning."""
        self._max_pages = max_pages
        self._key = secrets.token_bytes(hashlib.blake2b.MAX_KEY_SIZE)
        self._sent: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(pipelines)]

    def pages(self, prompt_ids: Sequence[int], salt: bytes) -> tuple[bytes, ...]:
        """Names of the whole pages of a prompt; each stands for all tokens up to its end, and for the salt."""
        tokens = array("I", prompt_ids[: MAX_PROMPT_PAGES * PAGE_TOKENS])
        said, name = memoryview(tokens.tobytes()), hashlib.blake2b(salt, key=self._key).digest()
        page_bytes, found = PAGE_TOKENS * tokens.itemsize, []
        for stop in range(page_bytes, len(said) + 1, page_bytes):
            name = hashlib.blake2b(
                name + said[stop - page_bytes : stop], digest_size=_HASH_BYTES, key=self._key
            ).digest()
            found.append(name)
        return tuple(found)

    def matched(self, pipeline: int, pages: Sequence[bytes]) -> int:
        """How many of these pages it was sent, from the first on."""
        sent = self._sent[pipeline]
        return next((i for i, page in enumerate(pages) if page not in sent), len(pages))

    def note(self, pipeline: int, pages: Sequence[bytes]) -> None:
        """It is sent these."""
        sent = self._sent[pipeline]
        for page in reversed(pages):
            sent[page] = None
            sent.move_to_end(page)
        while len(sent) > self._max_pages:
            sent.popitem(last=False)

    def forget(self, pipeline: int) -> None:
        """It holds nothing any more."""
        self._sent[pipeline].clear()

    def __len__(self) -> int:
        """Pages that are remembered."""
        return sum(map(len, self._sent))
