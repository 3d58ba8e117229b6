"""The streams of one engine. On a CPU, in the interpreter, there are none and everything happens in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Streams:
    """One on which steps run, one beside it."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self.main = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._beside = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def on_main(self) -> Iterator[None]:
        """Inside: work is queued where steps run."""
        if self.main is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self.main):
            yield

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Inside: work beside what follows, until join. One row is hashed by one lane, which leaves the GPU idle."""
        if self._beside is None:
            yield
            return
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            yield

    def join(self) -> None:
        """What follows comes after what runs beside."""
        if self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
