"""A step while it is being planned: rows are added, then it becomes the plan that travels."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass, field

import numpy as np

from serve_app.messages.controls import Controls
from serve_app.messages.step import CLOSE, DRAW_EACH, OPEN, SPAN, StepPlan
from serve_app.scheduling.sequence import Sequence

Flight = list[tuple[Sequence, int, int]]  # sequences of a step, tokens asked for, rows that have run after it


@dataclass(slots=True)
class Draft:
    """Sequences in the order of their rows."""

    flight: Flight = field(default_factory=list)
    opens: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    page_counts: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def add(
        self, sequence: Sequence, count: int, sample: bool, new: list[int], guesses: collections.abc.Sequence[int] = ()
    ) -> None:
        """The next `count` rows of a sequence run; `new`: the pages that it has taken for them.

        guesses: run behind the row of its last token; all of these draw.
        """
        start, draws = sequence.computed, sample + len(guesses)
        assert not guesses or (sample and count == 1 and start == len(sequence.tokens) - 1)
        sequence.guesses = (*guesses,) if guesses else sequence.guesses
        count += len(guesses)
        if not sequence.opened:
            sequence.opened = True
            self.opens.append(sequence)
            new = sequence.pages  # those that were filled already, too
        self.starts.append(start)
        self.counts.append(count)
        self.page_counts.append(len(new))
        if new:
            self.pages += new
        sequence.computed = start + count
        sequence.length += draws
        sequence.flights += 1
        self.flight.append((sequence, draws, start + count))

    @property
    def sequences(self) -> set[Sequence]:
        """Those whose rows are in it: their pages are not to be touched."""
        return {sequence for sequence, _, _ in self.flight}

    def plan(self, epoch: int, step: int, closes: list[tuple[int, int, int]], signs: list[int]) -> StepPlan:
        """What the stages are told."""
        spans = np.zeros(len(self.flight), SPAN)
        spans["seq"] = [sequence.ticket.seq for sequence, _, _ in self.flight]
        spans["sample"] = [min(draws, DRAW_EACH) for _, draws, _ in self.flight]
        spans["start"], spans["count"], spans["new_pages"] = self.starts, self.counts, self.page_counts
        return StepPlan(
            epoch,
            step,
            np.array([_open(s) for s in self.opens], OPEN),
            spans,
            np.array(self.pages, "<u4"),
            np.array(closes, CLOSE),
            np.array(signs, "<u8"),
            Controls.of((s.ticket.seq, s.ticket.sampling, s.tokens, s.n_prompt) for s in self.opens),
        )


def _open(sequence: Sequence) -> tuple[object, ...]:
    ticket, sampling = sequence.ticket, sequence.ticket.sampling
    return (
        ticket.seq,
        np.frombuffer(ticket.request_hash, "u1"),
        np.frombuffer(ticket.sampling_key, "u1"),
        sampling.temperature_micro,
        sampling.top_k,
        sampling.top_p_micro,
        sequence.attempt,
        sequence.cached,
    )
