"""The final norm and the output layer alone: logits of rows that left the last layer, for whoever draws again.

Knows nothing of stages, pages or requests. Rows go through in parts, so that memory is that of some rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import transformers

from serve_app.engine.fixed_windows import window_of, windows
from serve_app.engine.plain_profile import plain_profile
from serve_app.engine.stage_model import StageModel

_MAX_LOGITS = 1 << 24  # of one part: 64 MiB in float32

Floats = npt.NDArray[np.float32]


def head_profile(stage: str) -> str:
    """That of a head whose logits are, to the bit, those of a deterministic stage of this profile."""
    return f"head of {stage}"


class OutputHead:
    """Of one model, in one dtype on one device."""

    def __init__(
        self,
        model: StageModel,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        hidden_size: int,
        deterministic: bool = False,
    ) -> None:
        """model: one with a head. deterministic: a row's logits are those of a deterministic last stage, to the bit."""
        self._model, self._device, self._dtype, self._width = model, device, dtype, hidden_size
        self.vocab_size = vocab_size
        window = window_of(model.config.to_dict(), self._probe) if deterministic else None
        self._fixed = window is not None
        self._size = max(1, _MAX_LOGITS // vocab_size) if window is None else window
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.profile = f"head, torch {torch.__version__}, transformers {transformers.__version__}, {dtype}, {name}"
        if window is not None:
            self.profile = head_profile(plain_profile(dtype, device, window))

    def logits(self, rows: Floats) -> Iterator[Floats]:
        """[vocab] of each row in turn. rows: [n, width], values of the head's dtype or, if that is wider, another."""
        for start in range(0, len(rows), self._size):
            part = torch.from_numpy(np.ascontiguousarray(rows[start : start + self._size]))
            yield from self._logits(part.to(self._device, self._dtype), self._size).cpu().numpy()

    @torch.inference_mode()
    def _logits(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        if not self._fixed:
            return self._model.logits(rows)
        return torch.cat([self._model.logits(window)[:n] for _, n, window in windows(rows, size)])

    def _probe(self, size: int, before: int) -> torch.Tensor:
        """fixed_windows.fitting_size's hidden_of."""
        self._fixed, n = True, size + 3
        drawn = np.random.default_rng(0).standard_normal((n + size, self._width)).astype(np.float32)
        rows = torch.from_numpy(np.concatenate([drawn[n : n + before], drawn[:n]])).to(self._device, self._dtype)
        return self._logits(rows, size)[before:]
