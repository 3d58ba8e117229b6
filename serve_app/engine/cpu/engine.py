"""The engine for CPUs: merged weights that oneDNN has packed, few operators a layer, no gathers where pages are a run.

Steps are computed in `launch`: there is nothing beside them to overlap with on the same cores. Weights and their checks
are the plain engine's (torch_engine.py), whose modules this one reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.cpu.layers import new_cache, run_layers, step_of
from serve_app.engine.cpu.native import MAX_ROWS, NativeStage
from serve_app.engine.cpu.stage_weights import CpuWeights
from serve_app.engine.engine import Done, Launched, StepOutput
from serve_app.engine.request_table import Ints, PlannedSpans, RequestTable, token_ids
from serve_app.engine.sampler import SequenceDraw, opened_draws, require_no_counts
from serve_app.engine.torch_engine import TORCH_DTYPES, TorchEngine
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import StepPlan

_NO_ROWS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Spoilt:
    """Implements engine.Launched: a step that ended, and of which nothing can be used."""

    why: str

    def result(self) -> StepOutput:
        raise PipelineError(self.why)


class CpuEngine:
    """Implements engine.Engine."""

    def __init__(self, plain: TorchEngine, weights: CpuWeights, page_size: int, threads: int) -> None:
        """weights: of the plain engine, as stage_weights.read_weights has checked them."""
        profile = plain.profile
        self._weights, self._page_size, self._threads = weights, page_size, threads
        self._native: NativeStage | None = None
        self._dtype, self._hidden_size = TORCH_DTYPES[profile.dtype], profile.hidden_size
        self._row_bytes = 4 if weights.stage.embedding is not None else profile.hidden_size * self._dtype.itemsize
        self._draws: dict[int, SequenceDraw] = {}  # by slot, as is the next
        blocks, item = weights.stage.blocks, self._dtype.itemsize
        self.profile = replace(
            profile,
            description=f"{profile.description}, llmd_cpu{' native' if weights.native is not None else ''}",
            kv_page_bytes=sum(2 * b.kv_heads * page_size * b.dim * item for b in blocks),
        )

    @torch.inference_mode()
    def reserve(self, n_pages: int, max_sequences: int) -> None:
        stage = self._weights.stage
        self._cache = new_cache(stage.blocks, n_pages * self._page_size, self._dtype)
        # Sequences that end are closed by a later plan, and new ones may open before that.
        n_slots = 2 * max_sequences + 16
        self._table = RequestTable(n_slots, n_pages, self._page_size, stage.context_length, stage.device)
        self._pages: Ints = self._table.page_table.numpy()
        if self._weights.native is not None:
            self._native = NativeStage(
                self._weights.native,
                self._cache,
                self._pages,
                self._page_size,
                hidden=self._hidden_size,
                threads=self._threads,
                final=stage.final,
                head=self._weights.native_head,
            )
        self._last_tokens = np.zeros(n_slots, np.int32)

    @property
    def is_native(self) -> bool:
        """Whether steps of few rows are computed by the compiled step."""
        return self._weights.native is not None

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: memoryview) -> Launched:
        if len(rows) != plan.rows * self._row_bytes:
            raise ProtocolError(f"{len(rows)} bytes for {plan.rows} rows of {self._row_bytes}")
        embeds = self._weights.stage.embedding is not None
        ids = token_ids(rows, self._weights.stage.vocab_size) if embeds else None
        has_head = self._weights.head is not None
        opened = opened_draws(plan, self._weights.stage.vocab_size) if has_head else {}
        spans = self._table.begin(plan)
        try:
            if ids is not None and (ids < 0).any():
                self._table.require_drawn(spans, ids)
                ids = np.where(ids < 0, self._last_tokens[np.repeat(spans.slots, spans.counts)], ids)
                rows = ids.data.cast("B")
            self._pages.reshape(-1)[spans.page_places] = spans.pages
            self._draws |= zip(self._table.slots_of(list(opened)), opened.values(), strict=True)
            require_no_counts(plan, lambda seq: self._draws.get(self._table.slots_of([seq])[0]))
            launched = self._compute(plan, spans, ids, rows)
        except BaseException:
            self._table.undo(plan, spans)
            raise
        for slot in self._table.end(plan):
            self._draws.pop(slot, None)  # counts of a whole vocabulary, if it was penalised
        return launched

    def run(self, plan: StepPlan, rows: memoryview) -> StepOutput:
        """The step, waited for."""
        return self.launch(plan, rows).result()

    @torch.inference_mode()
    def logits_of(self, hidden: memoryview) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer: for whoever checks this engine's arithmetic."""
        rows = torch.frombuffer(bytearray(hidden), dtype=self._dtype).view(-1, self._hidden_size)
        return self._weights.logits(rows)

    def _compute(self, plan: StepPlan, spans: PlannedSpans, ids: Ints | None, rows: memoryview) -> Launched:
        if not plan.rows:
            return Done(StepOutput(rows, memoryview(b""), ()))
        x, last = self._enter(ids, rows), _NO_ROWS
        if self._weights.head is not None:
            last = plan.drawn_rows.astype(np.int32)
        if self._native is not None and len(x) <= MAX_ROWS:
            first = np.cumsum(spans.counts) - spans.counts
            positions = (np.repeat(spans.starts - first, spans.counts) + np.arange(len(x))).astype(np.int32)
            logits = self._native.run(x, np.repeat(spans.slots, spans.counts), positions, last)
            cap = self._weights.stage.logit_cap
            if cap is not None:
                torch.tanh(logits.div_(cap), out=logits).mul_(cap)
        else:
            x = run_layers(self._weights.layers, self._cache, step_of(spans, self._pages, self._page_size), x)
            logits = self._weights.logits(x[torch.from_numpy(last)]) if len(last) else torch.empty((0, 0))
        tokens: tuple[int, ...] = ()
        if len(last):
            values = logits.numpy()
            if not np.isfinite(values).all():
                return Spoilt("the last stage computed logits that are not finite")
            tokens = self._draw(plan, spans, values)
        return Done(StepOutput(rows, x.view(torch.uint8).numpy().reshape(-1).data, tokens))

    def _enter(self, ids: Ints | None, rows: memoryview) -> Tensor:
        """The rows that go into the first layer, in memory of their own."""
        stage = self._weights.stage
        if ids is None:  # copied: they are written to, and torch may not write into bytes
            return torch.frombuffer(bytearray(rows), dtype=self._dtype).view(-1, self._hidden_size)
        assert stage.embedding is not None
        x = stage.embedding.weight.index_select(
            0, torch.from_numpy(ids.copy())
        )  # torch dislikes what it may not write to
        return x if stage.embedding_scale == 1.0 else x.mul_(stage.embedding_scale)

    def _draw(
        self, plan: StepPlan, spans: PlannedSpans, logits: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    ) -> tuple[int, ...]:
        slots, draws = np.repeat(spans.slots, plan.draws), plan.draws
        behind = np.cumsum(draws)  # the position that a token takes: its row's and one
        positions = (np.repeat(spans.starts + spans.counts - behind, draws) + np.arange(len(slots)) + 1).tolist()
        drawn = [
            self._draws[slot].token(row, position)
            for slot, row, position in zip(slots.tolist(), logits, positions, strict=True)
        ]
        self._last_tokens[slots] = drawn
        self._table.drew_in(spans)
        return tuple(drawn)
