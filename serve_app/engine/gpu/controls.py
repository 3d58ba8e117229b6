"""Penalties, biases and min-p of open sequences on the GPU, by the request table's slots.

A sequence that draws plainly has a row of zeros here and costs nothing more. For the others the tokens they hold are
kept in pages beside their keys (4 bytes a position): those known when they open are written as their pages come, a
drawn one by the decode step that runs its row. Logits of their own are made room for when the first of them opens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.gpu.copies import upload, upload_all
from serve_app.engine.gpu.kernels.penalties import N_CONTROLS, apply_penalties
from serve_app.engine.gpu.kernels.sampler import Controlled, SamplerSpace, sample
from serve_app.engine.request_table import Ints, PlannedSpans, RequestTable
from serve_app.errors import ProtocolError
from serve_app.messages.controls import SequenceControls
from serve_app.messages.request import MAX_BIASES, MICRO
from serve_app.messages.step import DRAW_EACH, StepPlan


class ControlTable:
    """Who has controls, on the host; what they are, on the device."""

    def __init__(
        self,
        table: RequestTable,
        n_slots: int,
        n_pages: int,
        page_size: int,
        logits: tuple[int, int],
        device: torch.device,
    ) -> None:
        """logits: rows drawn from at a time, and ids in the vocabulary."""
        self._table, self._page_size, self._own_shape, self._device = table, page_size, logits, device
        self._known: dict[int, Ints] = {}  # slot -> the ids it was opened with
        self._written: dict[int, int] = {}  # slot -> how many of its positions have their token in `history`
        self._stale: set[int] = set()  # slots whose rows on the device are not zeros
        self.history = torch.zeros(n_pages * page_size, dtype=torch.int32, device=device)
        self._biases = torch.zeros((n_slots, MAX_BIASES, 2), dtype=torch.int32, device=device)
        self._own: Tensor | None = None
        self.controlled = Controlled(
            torch.zeros((n_slots, N_CONTROLS), dtype=torch.int32, device=device),
            torch.ones(n_slots, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def open(self, plan: StepPlan) -> None:
        """Those that open in this plan have slots by now: the device learns of their controls.

        Raises ProtocolError for a token outside the vocabulary, and for guesses of a sequence whose draws count, before
        anything changed.
        """
        for ids in (plan.controls.ids, plan.controls.biases["id"]):
            if len(ids) and int(ids.max()) >= self._own_shape[1]:
                raise ProtocolError(f"token id {int(ids.max())} in a vocabulary of {self._own_shape[1]}")
        counting = {one.seq for one in plan.controls if one.counts}
        for seq in plan.spans["seq"][plan.spans["sample"] == DRAW_EACH].tolist():
            if seq in counting or self._table.slots_of([seq])[0] in self._known:
                raise ProtocolError(f"guesses of sequence {seq}, which is penalised for what it draws")
        if not len(plan.opens) or not (self._stale or len(plan.controls.rows)):
            return
        controls = {one.seq: one for one in plan.controls}
        for seq in plan.opens["seq"].tolist():
            slot, one = self._table.slots_of([seq])[0], controls.get(seq)
            self.forget([slot])
            if one is not None:
                self._stale.add(slot)
                self._write(slot, one)
                if one.counts:
                    self._known[slot], self._written[slot] = one.ids.astype(np.int32), 0
            elif slot in self._stale:
                self._stale.discard(slot)
                self.controlled.controls[slot].zero_()
                self.controlled.min_p_log[slot].fill_(1.0)

    def first_ids(self, spans: PlannedSpans) -> Ints:
        """For a decode step of a stage that sees no ids: known from the opening, or -1: drawn last."""
        out = np.full(len(spans.slots), -1, np.int32)
        if self._known:
            for i, (slot, start) in enumerate(zip(spans.slots.tolist(), spans.starts.tolist(), strict=True)):
                if start < len(self._known.get(slot, ())):
                    out[i] = self._known[slot][start]
        return out

    def write_tokens(self, spans: PlannedSpans) -> None:
        """Each counted position that these spans come to has its token in its page. The pages are in their places."""
        slots, positions, ids = [], [], []
        for slot, stop in zip(spans.slots.tolist(), (spans.starts + spans.counts).tolist(), strict=True):
            if slot in self._known:
                new = np.arange(self._written[slot], stop, dtype=np.int32)
                known = self._known[slot][self._written[slot] : stop]
                slots.append(np.full(len(new), slot, np.int32))
                positions.append(new)
                ids.append(np.concatenate((known, np.full(len(new) - len(known), -1, np.int32))))
        if not slots:
            return
        arrays = (np.concatenate(slots), np.concatenate(positions), np.concatenate(ids))
        d_slots, d_positions, d_ids = upload_all(arrays, self._device)
        pages = self._table.page_table[d_slots.long(), (d_positions // self._page_size).long()]
        places = pages.long() * self._page_size + d_positions % self._page_size
        self.history[places] = torch.where(d_ids < 0, self._table.last_tokens[d_slots.long()], d_ids)

    def ran(self, spans: PlannedSpans, closed: list[int]) -> None:
        """A step has been launched: its positions have their tokens, and these slots are free."""
        self.forget(closed)
        if self._known:
            for slot, stop in zip(spans.slots.tolist(), (spans.starts + spans.counts).tolist(), strict=True):
                if slot in self._written:
                    self._written[slot] = stop

    def forget(self, slots: list[int]) -> None:
        """Whoever had these slots has ended. What the device holds of them is cleared when somebody opens there."""
        for slot in slots:
            self._known.pop(slot, None)
            self._written.pop(slot, None)

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, space: SamplerSpace) -> None:
        """tokens [rows] are drawn from the logits, as each row's sequence asks for it."""
        self.apply(logits, slots, positions)
        temperature, top_k, top_p = self._table.draws
        sample(
            logits,
            slots,
            positions,
            temperature_micro=temperature,
            top_k=top_k,
            top_p_micro=top_p,
            keys=self._table.keys,
            tokens=tokens,
            last_tokens=self._table.last_tokens,
            space=space,
            controlled=self.controlled,
        )

    def apply(self, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Rows that ask for it have logits of their own."""
        apply_penalties(
            logits,
            slots,
            positions,
            controls=self.controlled.controls,
            biases=self._biases,
            history=self.history,
            page_table=self._table.page_table,
            page_size=self._page_size,
            own_at=self.controlled.own_at,
        )

    def _write(self, slot: int, one: SequenceControls) -> None:
        changes = one.counts or len(one.biases) > 0
        if changes and self._own is None:
            self._own = torch.empty(self._own_shape, dtype=torch.float32, device=self._device)
            self.controlled.own_at.fill_(self._own.data_ptr())
        penalties = (one.presence_micro, one.frequency_micro, one.repetition_micro)
        row = np.array((changes, *penalties, one.n_prompt, len(one.biases)), np.int32)
        upload(row, self.controlled.controls[slot])
        self.controlled.min_p_log[slot].fill_(math.log(one.min_p_micro / MICRO) if one.min_p_micro else 1.0)
        if len(one.biases):
            pairs = np.stack((one.biases["id"].astype(np.int32), one.biases["micro"]), 1)
            upload(np.ascontiguousarray(pairs), self._biases[slot, : len(pairs)].view(-1))
