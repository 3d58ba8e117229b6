"""The final norm and the output layer alone: logits of rows that left the last layer, for whoever draws again.

Knows nothing of stages, pages or requests. Rows go through in parts, so that memory is that of some rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import transformers

from serve_app.engine.stage_model import StageModel

_MAX_LOGITS = 1 << 24  # of one part: 64 MiB in float32

Floats = npt.NDArray[np.float32]


class OutputHead:
    """Of one model, in one dtype on one device."""

    def __init__(self, model: StageModel, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """model: one with a head."""
        self._model, self._device, self._dtype = model, device, dtype
        self.vocab_size = vocab_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.profile = f"head, torch {torch.__version__}, transformers {transformers.__version__}, {dtype}, {name}"

    def logits(self, rows: Floats) -> Iterator[Floats]:
        """[vocab] of each row in turn. rows: [n, width], values of the head's dtype or, if that is wider, another."""
        size = max(1, _MAX_LOGITS // self.vocab_size)
        for start in range(0, len(rows), size):
            part = torch.from_numpy(np.ascontiguousarray(rows[start : start + size]))
            with torch.inference_mode():
                out = self._model.logits(part.to(self._device, self._dtype)).cpu().numpy()
            yield from out
