"""A step under way on the GPU, and the one block of memory in which it reports.

The report is int32: the ids of its rows, then tokens, then, if rows are hashed, the digests in and out. One block, so
that one copy brings it to the host; nobody writes to the host's copy again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve_app.engine.engine import StepOutput
from serve_app.errors import PipelineError


@dataclass(frozen=True, slots=True)
class RowDigests:
    """Implements engine.Digests. both: [2, rows, 8] int32, on the host already."""

    both: npt.NDArray[np.int32]

    def wait(self) -> tuple[memoryview, memoryview]:
        inlet, outlet = self.both.view(np.uint8).reshape(2, -1)
        return inlet.data, outlet.data


@dataclass(frozen=True, slots=True)
class Flight:
    """Implements engine.Launched. report (see report_ints) is on the host once `ended` has happened."""

    received: memoryview | None  # None: the ids in the report
    rows: int
    size: int  # rows the report has room for
    n_tokens: int
    hidden: Tensor | None
    lent: bytes | None  # in place of hidden: the reference to it
    report: Tensor
    ended: torch.cuda.Event | None
    hashed: bool
    # Copies for whoever keeps rows, of those that came (None: `received` or the report's ids) and of those that left.
    kept: tuple[Tensor | None, Tensor] | None = None

    def result(self) -> StepOutput:
        if self.ended is not None:
            self.ended.synchronize()
        report, rows, size = self.report.numpy(), self.rows, self.size
        tokens = report[size : size + self.n_tokens].tolist()
        if any(token < 0 for token in tokens):
            raise PipelineError("the last stage computed logits that are not finite")
        received = self.received
        if received is None:
            received = report[:rows].data.cast("B")
        hidden, digests = memoryview(self.lent or b""), None
        if self.hidden is not None:
            hidden = bytes_of(self.hidden)
        if self.hashed:
            digests = RowDigests(np.ascontiguousarray(report[2 * size :].reshape(2, size, 8)[:, :rows]))
        kept = None
        if self.kept is not None:
            came, left = self.kept
            kept = (received if came is None else bytes_of(came), bytes_of(left))
        return StepOutput(received, hidden, tuple(tokens), digests, kept)


def bytes_of(host: Tensor) -> memoryview:
    """What a contiguous tensor on the host holds."""
    return host.view(torch.uint8).numpy().reshape(-1).data


def report_ints(rows: int, hashed: bool) -> int:
    """int32 of a report: ids of `rows` rows, as many tokens, then, if rows are hashed, the digests in and out."""
    return rows * (2 + 16 * hashed)
