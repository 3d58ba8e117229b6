"""Which KV pages are free, and whose the others are. Ids only: the tensors are the stages'."""

from __future__ import annotations


class PagePool:
    """Hands out page ids 0 .. n-1. Law: every id is free or held exactly once."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages > 0
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: low ids first, so that runs stay contiguous

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """n ids that were free."""
        assert n <= self.free
        return [self._free.pop() for _ in range(n)]

    def give_back(self, pages: list[int]) -> None:
        """These ids are held no longer."""
        self._free.extend(reversed(pages))
        assert len(self._free) <= self.n_pages
