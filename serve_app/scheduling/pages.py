"""Which KV pages are free, and whose the others are. Ids only: the tensors are the stages'."""

from __future__ import annotations


class PagePool:
    """Hands out page ids 0 .. n-1. Law: every id is free or held exactly once."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages > 0
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: low ids first, so that runs stay contiguous
        self._promised = 0

    @property
    def free(self) -> int:
        """Pages that nobody holds and that are promised to nobody."""
        return len(self._free) - self._promised

    def promise(self, n: int) -> bool:
        """Set n pages aside for one sequence, or return False: then nothing changed."""
        if n > self.free:
            return False
        self._promised += n
        return True

    def take(self, n: int) -> list[int]:
        """n ids out of a promise."""
        assert n <= self._promised
        self._promised -= n
        return [self._free.pop() for _ in range(n)]

    def give_back(self, pages: list[int], promised: int) -> None:
        """End of a sequence: its pages and what was promised but never taken."""
        self._free.extend(reversed(pages))
        self._promised -= promised
        assert self._promised >= 0 and len(self._free) <= self.n_pages
