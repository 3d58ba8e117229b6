"""Keys and values of open sequences, in pages, for the layers of one stage.

A page holds `page_size` positions of one sequence in every layer of the stage. Which page belongs to whom is
the Head's business (scheduling/pages.py); here are the tensors and each sequence's list of pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve_app.errors import ProtocolError
from serve_app.messages.step import DRAW_EACH, StepPlan


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row, row + count) of a step are positions [start, start + count) of one sequence.

    slots: [start + count] int64, where each position up to the last row lies in the cache.
    """

    row: int
    start: int
    count: int
    slots: Tensor

    @property
    def length(self) -> int:
        """Positions known once this span has run."""
        return self.start + self.count


class KvPages:
    """The page tables and tensors of one stage."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.spans: tuple[Span, ...] = ()  # of the step, or window of it, that runs now; attention reads them
        self.row_by_row = False  # attention then reads each row for itself
        self.fresh = False  # the spans are several, of one length, each from position 0 on
        self.write_slots = torch.zeros(0, dtype=torch.int64)  # [rows] of that step
        self._device = device
        self._n_pages = 0
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._guesses: dict[int, int] = {}  # of those rows, how many at their end may turn out void
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [slots, kv_heads, dim]

    def reserve(self, n_pages: int) -> None:
        """Room for n_pages pages; the tensors of a layer appear when it first writes."""
        assert n_pages > 0
        self._n_pages = n_pages
        self._layers = {}

    @property
    def n_layers(self) -> int:
        """Layers that have written."""
        return len(self._layers)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers that have written."""
        return sum(t[0].numel() * t.element_size() for kv in self._layers.values() for t in kv) * self.page_size

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep this step's rows of one layer. keys, values: [rows, kv_heads, dim]. Returns the whole cache."""
        cache = self._layers.get(layer)
        if cache is None:
            slots = self._n_pages * self.page_size + 1  # the last one takes the rows that pad a window
            cache = (keys.new_empty((slots, *keys.shape[1:])), values.new_empty((slots, *values.shape[1:])))
            self._layers[layer] = cache
        cache[0].index_copy_(0, self.write_slots, keys)
        cache[1].index_copy_(0, self.write_slots, values)
        return cache

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """Inside: spans and write_slots are this plan's. After it: closed sequences are forgotten.

        Raises ProtocolError before anything changed if the plan does not continue what is open.
        """
        self._check(plan)
        for seq, cached in plan.opens[["seq", "cached"]].tolist():
            self._tables[seq], self._lengths[seq] = [], cached
        lies: list[npt.NDArray[np.int64]] = []  # by span
        page, places = 0, np.arange(self.page_size)
        for item in plan.spans:
            seq, start, count, new = (int(item[k]) for k in ("seq", "start", "count", "new_pages"))
            table = self._tables[seq]
            table += plan.pages[page : page + new].tolist()
            page += new
            self._lengths[seq], self._guesses[seq] = start + count, count - 1 if item["sample"] == DRAW_EACH else 0
            slots = np.array(table, np.int64)[:, None] * self.page_size + places
            lies.append(slots.reshape(-1)[: start + count])
        if lies:
            starts, counts = plan.spans["start"].tolist(), plan.spans["count"].tolist()
            written = [slots[start:] for slots, start in zip(lies, starts, strict=True)]
            # One copy to the device for all of them.
            *parts, self.write_slots = torch.split(
                torch.from_numpy(np.concatenate([*lies, *written])).to(self._device),
                [*(len(slots) for slots in lies), sum(counts)],
            )
            rows = np.cumsum(counts) - counts
            self.spans = tuple(map(Span, rows.tolist(), starts, counts, parts))
            self.fresh = not any(starts) and len(counts) > 1 and min(counts) == max(counts)
        try:
            yield
        finally:
            self.spans, self.fresh = (), False
            for seq in plan.closes["seq"]:
                self._tables.pop(int(seq), None)
                self._lengths.pop(int(seq), None)
                self._guesses.pop(int(seq), None)

    @contextmanager
    def window(self, first: int, rows: int, size: int) -> Iterator[None]:
        """Within a step. Inside: spans and write_slots are those of rows [first, first + rows) of it, padded to `size`.

        Each row attends for itself; what pads the window is written where nobody reads.
        """
        spans, write_slots = self.spans, self.write_slots
        inside = []
        for span in spans:
            a, b = max(span.row, first), min(span.row + span.count, first + rows)
            if a < b:
                start = span.start + a - span.row
                inside.append(Span(a - first, start, b - a, span.slots[: start + b - a]))
        spare = write_slots.new_full((size - rows,), self._n_pages * self.page_size)
        self.spans, self.row_by_row = tuple(inside), True
        self.write_slots = torch.cat([write_slots[first : first + rows], spare])
        try:
            yield
        finally:
            self.spans, self.write_slots, self.row_by_row = spans, write_slots, False

    def _check(self, plan: StepPlan) -> None:
        for what, seqs in (("opens", plan.opens["seq"]), ("runs", plan.spans["seq"])):
            if len(np.unique(seqs)) != len(seqs):
                raise ProtocolError(f"a step that {what} one sequence twice")
        opening = dict(plan.opens[["seq", "cached"]].tolist())
        if opening.keys() & self._tables.keys():
            raise ProtocolError(f"sequence {min(opening.keys() & self._tables.keys())} is open already")
        running = set(plan.spans["seq"].tolist())
        for seq, cached in opening.items():
            if cached % self.page_size or (cached and seq not in running):
                raise ProtocolError(
                    f"sequence {seq} opens behind {cached} rows and runs none, or they are no whole pages"
                )
        if len(plan.pages) and int(plan.pages.max()) >= self._n_pages:
            raise ProtocolError(f"page {int(plan.pages.max())} of {self._n_pages}")
        for item in plan.spans:
            seq, start, count, new = (int(item[k]) for k in ("seq", "start", "count", "new_pages"))
            if seq not in self._tables and seq not in opening:
                raise ProtocolError(f"sequence {seq} is not open")
            length = opening[seq] if seq in opening else self._lengths[seq]
            if not length - self._guesses.get(seq, 0) <= start <= length:
                raise ProtocolError(f"sequence {seq} goes on at {start}, but {length} rows have run")
            if (len(self._tables.get(seq, ())) + new) * self.page_size < start + count:
                raise ProtocolError(f"sequence {seq} has too few pages for {start + count} rows")
