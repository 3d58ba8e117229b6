"""The engine of plain torch ops: exact, on any device. Bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.engine import ActivationDtype, Done, EngineProfile, StepOutput
from serve_app.engine.fixed_windows import window_of, windows
from serve_app.engine.kv_pages import KvPages
from serve_app.engine.plain_profile import plain_profile
from serve_app.engine.sampler import SequenceDraw, opened_draws, require_no_counts
from serve_app.engine.stage_model import StageModel
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import DRAW_EACH, DRAWN_LAST, StepPlan, passing_plan

TORCH_DTYPES: dict[ActivationDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class TorchEngine:
    """Implements engine.Engine."""

    def __init__(
        self,
        model: StageModel,
        kv: KvPages,
        *,
        embeds: bool,
        head: bool,
        hidden_size: int,
        vocab_size: int,
        device: torch.device,
        dtype: ActivationDtype,
        deterministic: bool = False,
    ) -> None:
        """deterministic: a row's bits are the same whatever runs beside it (fixed_windows.py)."""
        self.model, self.embeds, self.has_head, self.vocab_size = model, embeds, head, vocab_size
        self.device, self.dtype = device, TORCH_DTYPES[dtype]
        self._kv, self._hidden_size = kv, hidden_size
        self._draws: dict[int, SequenceDraw] = {}
        self._last: dict[int, int] = {}  # the token each open sequence drew last
        self._row_bytes = 4 if embeds else hidden_size * self.dtype.itemsize
        self._window: int | None = None
        page_bytes = self._measure_page()
        if deterministic:
            self._window = window_of(model.config.to_dict(), self._probe)
        self.profile = EngineProfile(
            description=plain_profile(self.dtype, device, self._window),
            device=str(device),
            dtype=dtype,
            hidden_size=hidden_size,
            parameter_bytes=model.parameter_bytes,
            kv_page_bytes=page_bytes,
            memory_bytes=_free_bytes(device),
        )

    @property
    def kv(self) -> KvPages:
        """Its pages."""
        return self._kv

    def reserve(self, n_pages: int, max_sequences: int = 0) -> None:
        self._kv.reserve(n_pages)

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False

    def launch(self, plan: StepPlan, rows: memoryview) -> Done:
        return Done(self.run(plan, rows))

    @torch.inference_mode()
    def run(self, plan: StepPlan, rows: memoryview) -> StepOutput:
        """The step, at once."""
        if len(rows) != plan.rows * self._row_bytes:
            raise ProtocolError(f"{len(rows)} bytes for {plan.rows} rows of {self._row_bytes}")
        tokens: tuple[int, ...] = ()
        out = memoryview(b"")
        rows = self._resolve(plan, rows)
        inputs = self._tensor(rows) if plan.rows else None  # before the step begins: it may be refused
        opened = opened_draws(plan, self.vocab_size) if self.has_head else {}
        require_no_counts(plan, lambda seq: opened.get(seq) or self._draws.get(seq))
        with self._kv.step(plan):
            self._draws |= opened
            if inputs is not None:
                hidden = self._forward(inputs)
                if self.has_head:
                    tokens = self._draw(plan, hidden)
                out = hidden.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data
        for seq in plan.closes["seq"]:
            self._draws.pop(int(seq), None)
            self._last.pop(int(seq), None)
        return StepOutput(rows, out, tokens)

    @torch.inference_mode()
    def logits_of(self, hidden: memoryview) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer: for whoever checks this engine's arithmetic."""
        rows = torch.frombuffer(bytearray(hidden), dtype=self.dtype).view(-1, self._hidden_size)
        return self._logits(rows.to(self.device))

    @contextmanager
    def embedding_nudged(self, bit: int) -> Iterator[None]:
        """Inside, this bit of every value of the embedding is the other way: for whoever asks how much that changes."""
        weight = self.model.body.get_input_embeddings().weight.data
        bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)
        bits.bitwise_xor_(bit)
        try:
            yield
        finally:
            bits.bitwise_xor_(bit)

    def _resolve(self, plan: StepPlan, rows: memoryview) -> memoryview:
        """The rows with ids in place of DRAWN_LAST; the same buffer if there are none."""
        if not (self.embeds and self.has_head and plan.rows):
            return rows
        ids = np.frombuffer(rows, "<u4")
        later = np.flatnonzero(ids == DRAWN_LAST)
        if not len(later):
            return rows
        ids, first = ids.copy(), np.cumsum(plan.spans["count"]) - plan.spans["count"]
        for row in later.tolist():
            seq = int(plan.spans["seq"][np.searchsorted(first, row, "right") - 1])
            if seq not in self._last:
                raise ProtocolError(f"sequence {seq} has drawn no token yet")
            ids[row] = self._last[seq]
        return ids.data.cast("B")

    def _tensor(self, rows: memoryview) -> Tensor:
        """The rows of a message, on the device; copied, since torch may not write into bytes."""
        if not self.embeds:
            flat = torch.frombuffer(bytearray(rows), dtype=self.dtype)
            return flat.view(-1, self._hidden_size).to(self.device)
        ids = np.frombuffer(rows, "<u4")
        if int(ids.max()) >= self.vocab_size:
            raise ProtocolError(f"token id {int(ids.max())} in a vocabulary of {self.vocab_size}")
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def _forward(self, inputs: Tensor) -> Tensor:
        positions = self._positions()
        if self._window is None:
            return self.model.forward(inputs, positions)
        size, out = self._window, []
        for (first, n, rows), (_, _, at) in zip(windows(inputs, size), windows(positions, size), strict=True):
            with self._kv.window(first, n, size):
                out.append(self.model.forward(rows, at)[:n])
        return torch.cat(out)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._window is None:
            return self.model.logits(hidden)
        return torch.cat([self.model.logits(rows)[:n] for _, n, rows in windows(hidden, self._window)])

    def _positions(self) -> Tensor:
        return torch.cat([torch.arange(s.start, s.length) for s in self._kv.spans]).to(self.device)

    def _draw(self, plan: StepPlan, hidden: Tensor) -> tuple[int, ...]:
        at = plan.drawn_rows
        if not len(at):
            return ()
        logits = self._logits(hidden.index_select(0, torch.from_numpy(at).to(self.device))).cpu().numpy()
        if not np.isfinite(logits).all():
            raise PipelineError("the last stage computed logits that are not finite")
        seqs = np.repeat(plan.spans["seq"], plan.draws).tolist()
        positions = (self._positions()[at] + 1).tolist()
        drawn = tuple(self._draws[s].token(row, p) for s, row, p in zip(seqs, logits, positions, strict=True))
        self._last |= zip(seqs, drawn, strict=True)
        for seq in plan.spans["seq"][plan.spans["sample"] == DRAW_EACH].tolist():
            del self._last[seq]  # which of its tokens count is not known here
        return drawn

    def _measure_page(self) -> int:
        """Bytes of one page in all layers, seen in a step of one row: shapes differ between families."""
        self._kv.reserve(1)
        self._run_alone((1,), memoryview(bytes(self._row_bytes)))
        return self._kv.page_bytes

    def _probe(self, size: int, before: int) -> Tensor:
        """fixed_windows.fitting_size's hidden_of; with the head, its logits too."""
        self._window, n = size, size + 3
        page_size = self._kv.page_size
        self._kv.reserve(-(-before // page_size) + -(-n // page_size))
        generator = np.random.default_rng(0)  # the probe's rows are drawn first, so they are the same each time
        if self.embeds:
            ids = [generator.integers(0, self.vocab_size, count).astype("<u4") for count in (n, before)]
            data = np.concatenate(ids[::-1]).view(np.uint8)
        else:
            drawn = [generator.standard_normal((count, self._hidden_size)) for count in (n, before)]
            rows = torch.from_numpy(np.concatenate(drawn[::-1])).to(self.dtype)
            data = rows.view(torch.uint8).numpy().reshape(-1)
        hidden = self._run_alone((before, n) if before else (n,), data.data)
        found = torch.frombuffer(bytearray(hidden), dtype=self.dtype).view(-1, self._hidden_size)[before:].float()
        if not self.has_head:
            return found
        return torch.cat([found, self.logits_of(hidden)[before:].cpu()], 1)

    @torch.inference_mode()
    def _run_alone(self, counts: tuple[int, ...], rows: memoryview) -> memoryview:
        """The rows that leave a step of sequences that open and close with it."""
        return self.run(passing_plan(counts, self._kv.page_size), rows).hidden


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise PipelineError("/proc/meminfo does not say how much memory is available")
