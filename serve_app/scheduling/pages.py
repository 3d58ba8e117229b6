"""Which KV pages are free, whose the others are, and what they hold. Ids only: the tensors are the stages'.

Several sequences may hold one page, if they begin alike. A page that is given back keeps what it holds, and can be
found by its name, until it is taken for something else; of pages with a name the one unused longest is taken first.
A name stands for all token ids from the first to the page's last: SHA-256 chained page by page, so that nobody can
craft another beginning of the same name. A pool is of one model, so names need not say which.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class PagePool:
    """Hands out page ids 0 .. n-1. Law: every id is held, or free and nameless, or free and to be found by its name."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages > 0
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: low ids first, so that runs stay contiguous
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and named, unused longest first
        self._holders = [0] * n_pages
        self._names: list[bytes | None] = [None] * n_pages
        self._pages: dict[bytes, int] = {}  # by name

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._idle)

    def take(self, n: int) -> list[int]:
        """n ids that were free; what they held cannot be found any more."""
        assert n <= self.free
        taken = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                name, self._names[page] = self._names[page], None
                assert name is not None
                del self._pages[name]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """One holder less of each."""
        for page in reversed(pages):  # the last first: what few beginnings share goes before what many do
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page] == 0:
                if self._names[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def name(self, page: int, name: bytes) -> None:
        """From now on a held page can be found, unless another of that name can be already."""
        assert self._holders[page] > 0 and self._names[page] is None
        if name not in self._pages:
            self._names[page], self._pages[name] = name, page

    def forget(self) -> None:
        """No page can be found any more; who holds some keeps them."""
        self._free += self._idle
        self._idle.clear()
        for page in self._pages.values():
            self._names[page] = None
        self._pages.clear()

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of these names, up to the first that is nowhere."""
        found = []
        for name in names:
            page = self._pages.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def unheld(self, pages: list[int]) -> int:
        """How many of these pages count as free."""
        return sum(self._holders[page] == 0 for page in pages)

    def share(self, pages: list[int]) -> None:
        """One holder more of each of these pages that were found."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)


def no_page(salt: bytes) -> bytes:
    """What stands for the name before that of a first page: beginnings of different salts have no name in common."""
    return hashlib.sha256(b"llmd.prefix.v1\0" + salt).digest()


def page_names(before: bytes, ids: Sequence[int], page_size: int) -> list[bytes]:
    """The names of the full pages that `ids` fill, behind the page named `before`."""
    name, data, step = before, np.array(ids, "<u4").tobytes(), 4 * page_size
    names = []
    for i in range(0, len(data) - step + 1, step):
        name = hashlib.sha256(name + data[i : i + step]).digest()
        names.append(name)
    return names
