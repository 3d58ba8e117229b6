"""What a fused engine knows of open sequences, on the host and on the device.

Each open sequence has a slot. The device holds, by slot: the list of its pages, how to draw, and the token it drew
last. The host holds what is needed to check a plan before anything changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve_app.errors import ProtocolError
from serve_app.messages.step import DRAW_EACH, DRAWN_LAST, NO_DRAW, StepPlan

Ints = npt.NDArray[np.int32]
_INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class PlannedSpans:
    """The spans of one plan by slot, each array [spans] int32, and its new pages as places in the flat page table."""

    slots: Ints
    starts: Ints
    counts: Ints
    samples: npt.NDArray[np.bool_]
    each: npt.NDArray[np.bool_]  # whether all of its rows are drawn from, and those after the first are guesses
    page_places: Ints  # [pages]
    pages: Ints  # [pages]
    new_pages: Ints  # how many of these are each span's


def token_ids(rows: memoryview, vocab_size: int) -> Ints:
    """Token ids as int32, -1 for DRAWN_LAST. Raises ProtocolError for one that is none of the vocabulary."""
    ids = np.frombuffer(rows, "<u4")
    known = ids[ids != DRAWN_LAST]
    if len(known) and int(known.max()) >= vocab_size:
        raise ProtocolError(f"token id {int(known.max())} in a vocabulary of {vocab_size}")
    return ids.view("<i4")


class RequestTable:
    """Slots, pages and draws of open sequences."""

    def __init__(self, n_slots: int, n_pages: int, page_size: int, context_length: int, device: torch.device) -> None:
        self._n_pages, self._page_size = n_pages, page_size
        self._limit = context_length
        self._width = -(-context_length // page_size)
        self._slots: dict[int, int] = {}
        self._free = list(range(n_slots - 1, -1, -1))
        self._lengths = np.zeros(n_slots, np.int32)
        self._guesses = np.zeros(n_slots, np.int32)  # of those rows, how many at their end may turn out void
        self._before = self._lengths[:0], self._guesses[:0]  # both, of the slots of the step that began last
        self._held = np.zeros(n_slots, np.int32)  # pages
        self.drew = np.zeros(n_slots, np.bool_)
        self.page_table = torch.zeros((n_slots, self._width), dtype=torch.int32, device=device)
        # Rows of draws: temperature_micro, top_k, top_p_micro. keys: the two words of each.
        self.draws = torch.zeros((3, n_slots), dtype=torch.int32, device=device)
        self.keys = torch.zeros((n_slots, 2), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(n_slots, dtype=torch.int32, device=device)

    def begin(self, plan: StepPlan) -> PlannedSpans:
        """Open sequences and lengthen those that run. Raises ProtocolError before anything changed."""
        opens, seqs = plan.opens["seq"].tolist(), plan.spans["seq"].tolist()
        for what, given in (("opens", opens), ("runs", seqs)):
            if len(set(given)) != len(given):
                raise ProtocolError(f"a step that {what} one sequence twice")
        already = [seq for seq in opens if seq in self._slots]
        if already:
            raise ProtocolError(f"sequence {min(already)} is open already")
        if len(opens) > len(self._free):
            raise ProtocolError(f"{len(opens)} sequences open and there is room for {len(self._free)} more")
        if len(plan.pages) and int(plan.pages.max()) >= self._n_pages:
            raise ProtocolError(f"page {int(plan.pages.max())} of {self._n_pages}")
        slot_of = dict(zip(opens, reversed(self._free[len(self._free) - len(opens) :]), strict=True))
        lookup = self._slots | slot_of if opens else self._slots
        try:
            slots = np.array([lookup[seq] for seq in seqs], np.int32)
        except KeyError as e:
            raise ProtocolError(f"sequence {e.args[0]} is not open") from None
        starts, counts = plan.spans["start"].astype(np.int64), plan.spans["count"].astype(np.int64)
        new = plan.spans["new_pages"].astype(np.int64)
        fresh = np.isin(slots, list(slot_of.values())) if opens else np.zeros(len(slots), np.bool_)
        before = self._lengths[slots], self._guesses[slots]
        lengths, guesses, held = (np.where(fresh, 0, array) for array in (*before, self._held[slots]))
        if plan.opens["cached"].any():
            lengths = self._behind_cached(plan, seqs, lengths)
        stop, pages = starts + counts, held + new
        for wrong, why in (
            ((starts > lengths) | (starts < lengths - guesses), "goes on at another position than it has come to"),
            (pages * self._page_size < stop, "has too few pages for its rows"),
            ((stop > self._limit) | (pages > self._width), f"grows beyond {self._limit} positions"),
        ):
            if wrong.any():
                raise ProtocolError(f"sequence {seqs[int(np.argmax(wrong))]} {why}")
        for seq, slot in slot_of.items():
            self._slots[seq] = slot
            self.drew[slot] = False
        del self._free[len(self._free) - len(opens) :]
        self._before, each = before, plan.spans["sample"] == DRAW_EACH
        self._lengths[slots], self._held[slots] = stop, pages
        self._guesses[slots] = np.where(each, counts - 1, 0)
        first = np.repeat(slots.astype(np.int64) * self._width + held, new)
        within = np.arange(len(plan.pages)) - np.repeat(np.cumsum(new) - new, new)
        return PlannedSpans(
            slots=slots,
            starts=starts.astype(np.int32),
            counts=counts.astype(np.int32),
            samples=plan.spans["sample"] != NO_DRAW,
            each=each,
            page_places=(first + within).astype(np.int32),
            pages=plan.pages.astype(np.int32),
            new_pages=new.astype(np.int32),
        )

    def _behind_cached(self, plan: StepPlan, seqs: list[int], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each span must start, given the sequences that open behind rows which their pages hold already."""
        cached = {seq: n for seq, n in plan.opens[["seq", "cached"]].tolist() if n}
        for seq, n in cached.items():
            if n % self._page_size or seq not in seqs:
                raise ProtocolError(f"sequence {seq} opens behind {n} rows and runs none, or they are no whole pages")
        return np.array([cached.get(seq, length) for seq, length in zip(seqs, lengths.tolist(), strict=True)])

    def undo(self, plan: StepPlan, spans: PlannedSpans) -> None:
        """The step that began last could not run: its sequences are as before it."""
        self._lengths[spans.slots], self._guesses[spans.slots] = self._before
        self._held[spans.slots] -= spans.new_pages
        for seq in plan.opens["seq"].tolist():
            self._free.append(self._slots.pop(seq))

    def drew_in(self, spans: PlannedSpans) -> None:
        """These have drawn. After guesses it is not known here which token is the last: which were right is not."""
        self.drew[spans.slots[spans.samples]] = ~spans.each[spans.samples]

    def require_drawn(self, spans: PlannedSpans, ids: Ints) -> None:
        """Raises ProtocolError if a row stands for a token drawn last (-1) and its sequence has drawn none here."""
        of = np.searchsorted(np.cumsum(spans.counts), np.flatnonzero(ids < 0), "right")
        if not self.drew[spans.slots[of]].all():
            raise ProtocolError("a row of a token drawn last, of a sequence that has drawn none here")

    def slots_of(self, seqs: list[int]) -> list[int]:
        """Of sequences that are open."""
        return [self._slots[seq] for seq in seqs]

    def opened(self, plan: StepPlan) -> Ints:
        """[opens, 6]: slot, temperature, top_k, top_p, key words, for the device."""
        out = np.zeros((len(plan.opens), 6), np.int32)
        out[:, 0] = self.slots_of(plan.opens["seq"].tolist())
        for column, name in enumerate(("temperature_micro", "top_k", "top_p_micro"), 1):
            out[:, column] = np.minimum(plan.opens[name], _INT32_MAX)
        out[:, 4:] = np.ascontiguousarray(plan.opens["key"]).view("<i4")
        return out

    def write_opened(self, opened: Tensor) -> None:
        """The same rows, on the device, into the table."""
        slots = opened[:, 0].long()
        self.draws.index_copy_(1, slots, opened[:, 1:4].t().contiguous())
        self.keys.index_copy_(0, slots, opened[:, 4:].contiguous())

    def write_pages(self, places: Tensor, pages: Tensor) -> None:
        """Put pages in their places in the flat table."""
        self.page_table.view(-1).index_copy_(0, places.long(), pages)

    def end(self, plan: StepPlan) -> list[int]:
        """Forget closed sequences, unknown ones were forgotten already; the slots that are free now."""
        closed = []
        for seq in plan.closes["seq"].tolist():
            slot = self._slots.pop(seq, None)
            if slot is not None:
                self._lengths[slot] = self._guesses[slot] = self._held[slot] = 0
                closed.append(slot)
        self._free += closed
        return closed
