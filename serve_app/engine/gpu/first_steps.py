"""Steps that nobody asked for, run once so that what they need is compiled before a request waits for it."""

from __future__ import annotations

import numpy as np

from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan

_ONE, _MANY = (1 << 63) - 2, (1 << 63) - 1  # sequence numbers that no Head comes to
N_ROWS = 80  # of the prompt: enough for the kernels that only large steps take


def prompt_beside_a_row(page_size: int) -> list[StepPlan]:
    """A prompt and a row that attends as decode rows do, both drawn from; then both are forgotten."""
    opens = np.zeros(2, OPEN)
    opens["seq"], opens["temperature_micro"], opens["top_p_micro"] = (_ONE, _MANY), 1_000_000, 1_000_000
    n_pages = -(-N_ROWS // page_size)
    spans = np.array([(_ONE, 0, 1, 1, 1), (_MANY, 0, N_ROWS, n_pages, 1)], SPAN)
    closes = np.array([(seq, 0, 0) for seq in (_ONE, _MANY)], CLOSE)
    nothing = np.zeros(0, "<u8")
    return [
        StepPlan(0, 0, opens, spans, np.arange(1 + n_pages, dtype="<u4"), closes[:0], nothing),
        StepPlan(0, 1, opens[:0], spans[:0], np.zeros(0, "<u4"), closes, nothing),
    ]
