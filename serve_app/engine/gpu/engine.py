"""The engine for GPUs: paged attention and sampling by our kernels, decode steps as CUDA graphs, nothing waited for.

A step of one row per sequence, or of one and guesses, replays a graph of its number of rows; every other step launches
the same kernels one by one. What a step draws stays on the device for the next step (DRAWN_LAST), so `launch` returns
as soon as the work is queued; results come back in memory that nobody writes again. Weights and their checks are the
plain engine's (torch_engine.py), whose modules this one reads.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.engine import BoxKind, KvDtype, StepOutput
from serve_app.engine.gpu.attend import DecodeAttention, PrefillAttention, RowAttention, tiles_of
from serve_app.engine.gpu.controls import ControlTable
from serve_app.engine.gpu.copies import download, upload, upload_all
from serve_app.engine.gpu.decode_rows import decode_rows, leading
from serve_app.engine.gpu.first_steps import N_ROWS, prompt_beside_a_row
from serve_app.engine.gpu.flight import Flight, report_ints
from serve_app.engine.gpu.forward import Attend, Pages, Space, norm, part, run_layers
from serve_app.engine.gpu.kernels.prepare import N_FIELDS, padding, prepare
from serve_app.engine.gpu.kernels.row_hash import RowHasher
from serve_app.engine.gpu.kernels.sampler import SamplerSpace
from serve_app.engine.gpu.port import Port
from serve_app.engine.gpu.products import embed, head_product
from serve_app.engine.gpu.profile import kv_dtype, profile_of
from serve_app.engine.gpu.stage_weights import logits_of
from serve_app.engine.gpu.streams import Streams
from serve_app.engine.request_table import Ints, PlannedSpans, RequestTable, token_ids
from serve_app.engine.stage_weights import StageWeights
from serve_app.engine.torch_engine import TORCH_DTYPES, TorchEngine
from serve_app.errors import ProtocolError
from serve_app.messages.step import StepPlan

_NO_IDS = np.zeros(0, np.int32)


def batch_sizes(max_sequences: int) -> list[int]:
    """For which numbers of rows a graph is made; a step takes the next larger one."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_sequences + 16, 16)]
    return sorted({min(size, max_sequences) for size in sizes})


class GpuEngine:
    """Implements engine.Engine, engine.LendsRows and engine.KeepsRows."""

    def __init__(
        self,
        plain: TorchEngine,
        weights: StageWeights,
        page_size: int,
        deterministic: bool = False,
        kv: KvDtype = "auto",
    ) -> None:
        """weights: of the plain engine, as gpu/stage_weights.py's read_weights has checked them.

        deterministic: tiles and parts are fixed, so a row's bits are the same whatever runs beside it.
        """
        self._fixed = deterministic
        profile = plain.profile
        self._weights, self._page_size = weights, page_size
        self.timings: dict[str, float] = {}  # parts of the start-up, seconds
        self._device, self._dtype = weights.device, TORCH_DTYPES[profile.dtype]
        self._row_bytes = 4 if weights.embedding is not None else profile.hidden_size * self._dtype.itemsize
        self._hidden_size = profile.hidden_size
        self._kv_dtype = kv_dtype(self._dtype, kv)
        self.profile = profile_of(profile, weights, page_size, deterministic, kv)
        self._cuda = self._device.type == "cuda"
        self._streams = Streams(self._device)
        self._hashers: tuple[RowHasher, RowHasher] | None = None
        self._port = Port(self._device, weights.vocab_size)
        self._keeps = False
        self._spaces: Space | None = None
        self._controls: ControlTable | None = None  # where tokens are drawn
        # By rows. None: the device has no graphs, the same calls are made one by one.
        self._replays: dict[int, torch.cuda.CUDAGraph | None] = {}

    @torch.inference_mode()
    def reserve(self, n_pages: int, max_sequences: int) -> None:
        weights, device = self._weights, self._device
        self._max_rows, self._n_pages = max_sequences, n_pages
        self._pages = Pages(weights.blocks, n_pages, self._page_size, device, self._kv_dtype)
        # Sequences that end are closed by a later plan, and new ones may open before that.
        n_slots = 2 * max_sequences + 16
        self._table = RequestTable(n_slots, n_pages, self._page_size, weights.context_length, device)
        self._space = Space(max_sequences, weights.blocks, self._hidden_size, device, self._dtype)
        self._fields = torch.zeros(N_FIELDS * max_sequences, dtype=torch.int32, device=device)
        self._report = torch.zeros(report_ints(max_sequences, True), dtype=torch.int32, device=device)
        self._slots, self._positions, self._lengths = (
            torch.zeros(max_sequences, dtype=torch.int32, device=device) for _ in range(3)
        )
        self._arrived = torch.zeros((max_sequences, self._hidden_size), dtype=self._dtype, device=device)
        self._decode = DecodeAttention(
            weights.blocks, max_sequences, device, weights.context_length if self._fixed else None
        )
        if weights.head is not None:
            self._logits = torch.zeros((max_sequences, weights.head.n_out), dtype=self._dtype, device=device)
            self._sampler = SamplerSpace(max_sequences, weights.head.n_out, device)
            self._controls = ControlTable(
                self._table, n_slots, n_pages, self._page_size, (max_sequences, weights.head.n_out), device
            )
        self._replays = {}
        self._sizes = batch_sizes(max_sequences)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: memoryview) -> Flight:
        if not self._port.holds(rows, plan.rows * self._row_bytes):
            raise ProtocolError(f"{len(rows)} bytes for {plan.rows} rows of {self._row_bytes}")
        if not self._replays:  # only now is it known whether rows are hashed
            self._make_replays()
        ids = token_ids(rows, self._weights.vocab_size) if self._weights.embedding is not None else _NO_IDS
        spans, self._step = self._table.begin(plan), plan.step
        try:
            with self._streams.on_main():
                if self._controls is not None:
                    self._controls.open(plan)
                if (ids < 0).any():
                    self._table.require_drawn(spans, ids)
                    self._port.require_tokens(spans, ids, self._table)
                alike = self._decode_rows(spans) if not len(plan.opens) else None
                if alike is not None:
                    flight = self._run_decode(spans, alike, ids, rows)
                else:
                    flight = self._run_mixed(plan, spans, ids, rows)
                self._port.drew(plan, spans, self._table)
        except BaseException:
            self._table.undo(plan, spans)
            raise
        closed = self._table.end(plan)
        if self._controls is not None:
            self._table.drew_in(spans)
            self._controls.ran(spans, closed)
        return flight

    @torch.inference_mode()
    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        self._hashers = (
            RowHasher(inlet, self._row_bytes, self._device),
            RowHasher(outlet, self._hidden_size * self._dtype.itemsize, self._device),
        )
        self._port.hand_on = hand_on
        if self._cuda:  # now, not when the first request waits
            self._make_replays()
            self._run_first_steps()
        return True

    def keep_rows(self) -> None:
        self._keeps = True

    def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        return self._port.offer_inbox(kind, places, self._max_rows) if self._hashers is not None else None

    def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        return self._port.try_outbox(kind, offer)

    def got_probe(self, kind: BoxKind) -> bool:
        return self._port.got_probe(kind)

    def use_outbox(self, kind: BoxKind) -> None:
        self._port.use_outbox(kind)

    def release_boxes(self) -> None:
        self._port.release()

    def drop_boxes(self) -> None:
        self._port = self._port.renewed()

    def run(self, plan: StepPlan, rows: memoryview) -> StepOutput:
        """The step, waited for."""
        return self.launch(plan, rows).result()

    @torch.inference_mode()
    def logits_of(self, hidden: memoryview) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer: for whoever checks this engine's arithmetic."""
        rows = torch.frombuffer(bytearray(hidden), dtype=self._dtype).view(-1, self._hidden_size)
        return logits_of(rows.to(self._device), self._weights, self._fixed)

    def _decode_rows(self, spans: PlannedSpans) -> Ints | None:
        """The rows, if a graph can take them: each is the next of a sequence or a guess and, with a head, draws."""
        if not ((spans.counts == 1) | spans.each).all() or not 0 < int(spans.counts.sum()) <= self._max_rows:
            return None
        if self._weights.head is not None and not spans.samples.all():
            return None
        return decode_rows(spans, self._page_size, self._table.page_table.shape[1])

    def _run_decode(self, spans: PlannedSpans, alike: Ints, ids: Ints, rows: memoryview) -> Flight:
        """alike: as decode_rows gives them."""
        n = alike.shape[1]
        size = next(size for size in self._sizes if size >= n)
        fields = np.empty((N_FIELDS, size), np.int32)
        fields[0], fields[1], fields[2], fields[3] = 0, -1, 0, -1
        if len(ids):
            fields[0, :n] = ids
        elif self._controls is not None:
            fields[0, :n] = np.repeat(self._controls.first_ids(spans), spans.counts)
        fields[1:, :n] = alike
        upload(fields, self._fields[: N_FIELDS * size])
        if self._weights.embedding is None:
            self._port.bring(rows, self._arrived[:n])
        replay = self._replays[size]
        if replay is not None:
            replay.replay()
        else:
            self._decode_step(size)
        n_tokens = n if self._weights.head is not None else 0
        report = self._report[: report_ints(size, self._hashers is not None)]
        return self._download(rows, report, n, size, n_tokens, self._space.residual[:n], self._arrived[:n])

    def _decode_step(self, rows: int) -> None:
        """What a graph holds: everything from one plan's fields to its report."""
        weights, table = self._weights, self._table
        whole = self._report[: report_ints(rows, self._hashers is not None)]
        report = whole[: 2 * rows].view(2, rows)
        slots, positions, lengths = self._slots[:rows], self._positions[:rows], self._lengths[:rows]
        prepare(
            self._fields[: N_FIELDS * rows].view(N_FIELDS, rows),
            table.last_tokens,
            table.page_table,
            self._page_size,
            ids=report[0],
            slots=slots,
            positions=positions,
            lengths=lengths,
            history=None if self._controls is None else self._controls.history,
        )
        self._enter(report[0], self._arrived[:rows], self._space.residual[:rows])
        attend = self._decode.bind(table.page_table, slots, lengths)
        run_layers(
            weights.blocks,
            self._pages,
            self._space,
            rows,
            page_table=table.page_table,
            slots=slots,
            positions=positions,
            attend=attend,
            final=weights.final,
            fixed=self._fixed,
        )
        with self._streams.fork():
            came = report[0] if weights.embedding is not None else self._arrived[:rows]
            self._hash(came, self._space.residual[:rows], positions, whole[2 * rows :])
        if weights.head is not None:
            self._draw(self._space.x[:rows], slots, positions, report[1])
        self._streams.join()

    def _run_mixed(self, plan: StepPlan, spans: PlannedSpans, ids: Ints, rows: memoryview) -> Flight:
        """A step with prompts in it: the rows of one-row spans and of guesses at its start attend as decode rows do."""
        weights, table, n = self._weights, self._table, plan.rows
        if n == 0:
            self._port.give_tokens(plan.step, None)
            return Flight(None, 0, 0, 0, None, None, torch.empty(0, dtype=torch.int32), None, False)
        first = np.cumsum(spans.counts) - spans.counts
        n_alike, n_decode = leading(spans, self._max_rows)
        row_slots = np.repeat(spans.slots, spans.counts)
        positions = (np.repeat(spans.starts - first, spans.counts) + np.arange(n)).astype(np.int32)
        tiles = tiles_of(weights.blocks, spans, first, len(first) if self._fixed else n_alike)
        drawn = plan.drawn_rows.astype(np.int32) if weights.head is not None else _NO_IDS
        opened = table.opened(plan)
        flat = upload_all(
            (ids, row_slots, positions, spans.page_places, spans.pages, *tiles, drawn, opened.reshape(-1)),
            self._device,
        )
        d_ids, d_slots, d_positions, d_places, d_pages, *d_tiles, d_drawn, d_opened = flat
        if len(opened):
            table.write_opened(d_opened.view(-1, 6))
        if len(spans.pages):
            table.write_pages(d_places, d_pages)
        if self._controls is not None:
            self._controls.write_tokens(spans)
        if len(ids):
            d_ids = torch.where(d_ids < 0, table.last_tokens[d_slots.long()], d_ids)
        space = self._space_for(n)
        arrived = torch.empty((0, self._hidden_size), device=self._device, dtype=self._dtype)
        if weights.embedding is None:
            arrived = torch.empty((n, self._hidden_size), device=self._device, dtype=self._dtype)
            self._port.bring(rows, arrived)
        self._enter(d_ids, arrived, space.residual[:n])
        attend: Attend
        if self._fixed:
            attend = RowAttention(self._decode, table.page_table, d_slots, d_positions)
        else:
            there = [t.view(-1, 4) for t in d_tiles]
            decode = self._decode.bind(table.page_table, d_slots[:n_decode], d_positions[:n_decode] + 1)
            attend = PrefillAttention(decode, n_decode, table.page_table, there, weights.blocks)
        run_layers(
            weights.blocks,
            self._pages,
            space,
            n,
            page_table=table.page_table,
            slots=d_slots,
            positions=d_positions,
            attend=attend,
            final=None,
            fixed=self._fixed,
        )
        report = torch.empty(report_ints(n, self._hashers is not None), dtype=torch.int32, device=self._device)
        if len(ids):
            report[:n] = d_ids
        tokens = report[n : n + len(drawn)]
        if len(drawn):
            at = d_drawn.long()
            x = torch.empty((len(drawn), self._hidden_size), device=self._device, dtype=self._dtype)
            assert weights.final is not None
            norm(space.residual[:n].index_select(0, at), weights.final, x)
            for i in range(0, len(drawn), self._max_rows):
                now = slice(i, i + self._max_rows)
                self._draw(x[now], d_slots[at[now]], d_positions[at[now]], tokens[now])
        came = report[:n] if weights.embedding is not None else arrived
        self._hash(came, space.residual[:n], d_positions, report[2 * n :])
        return self._download(rows, report, n, n, len(drawn), space.residual[:n], arrived)

    def _enter(self, ids: Tensor, arrived: Tensor, out: Tensor) -> None:
        """The rows that go into the first layer."""
        weights = self._weights
        if weights.embedding is None:
            out.copy_(arrived)
        else:
            embed(ids, weights.embedding, weights.embedding_scale, out)

    def _draw(self, x: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        weights = self._weights
        assert weights.head is not None and self._controls is not None
        logits = part(self._logits, len(x), weights.head.n_out)
        head_product(x, weights.head, logits, self._fixed)
        if weights.logit_cap is not None:
            torch.tanh(logits.div_(weights.logit_cap), out=logits).mul_(weights.logit_cap)
        self._controls.draw(logits, slots, positions, tokens, self._sampler)

    def _run_first_steps(self) -> None:
        began, plans = time.perf_counter(), prompt_beside_a_row(self._page_size)
        room = min(self._weights.context_length, self._n_pages * self._page_size)
        if self._max_rows > 1 and room > N_ROWS + self._page_size:
            for plan in plans:
                self.run(plan, memoryview(bytes(plan.rows * self._row_bytes)))
        self.timings["first_steps_s"] = time.perf_counter() - began

    def _make_replays(self) -> None:
        began = time.perf_counter()
        with self._streams.on_main():
            self._capture()
        self.timings["graphs_s"] = time.perf_counter() - began

    def _capture(self) -> None:
        pool = None
        for size in reversed(self._sizes):  # the largest first: the others then fit into its memory
            graph = None
            if self._cuda:
                self._fields[: N_FIELDS * size].view(N_FIELDS, size).copy_(padding(size, self._device))
                self._decode_step(size)  # compiles what is new, and lets libraries choose
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=self._streams.main, capture_error_mode="thread_local"):
                    self._decode_step(size)
                pool = graph.pool()
            self._replays[size] = graph

    def _space_for(self, rows: int) -> Space:
        if self._spaces is None or self._spaces.rows < rows:
            self._spaces = None  # first, so that both are never held
            room = -(-rows // 256) * 256
            self._spaces = Space(room, self._weights.blocks, self._hidden_size, self._device, self._dtype)
        return self._spaces

    def _download(
        self, rows: memoryview, report: Tensor, n: int, size: int, n_tokens: int, hidden: Tensor, arrived: Tensor
    ) -> Flight:
        """Start the copies to the host. arrived: what came in, if it was no ids."""
        to_host = download(report)
        hidden_host, lent = self._port.give(hidden)
        kept = None
        if self._keeps:
            there = self._weights.embedding is not None or len(rows) == n * self._row_bytes
            kept = (None if there else download(arrived), download(hidden) if hidden_host is None else hidden_host)
        self._port.give_tokens(self._step, report[size : size + n_tokens])
        ended = None
        if self._cuda:
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record()
        received = None if self._weights.embedding is not None else rows
        return Flight(received, n, size, n_tokens, hidden_host, lent, to_host, ended, self._hashers is not None, kept)

    def _hash(self, came: Tensor, hidden: Tensor, positions: Tensor, out: Tensor) -> None:
        """out [2 * rows * 8]: digests of the rows that came in, then of those that leave."""
        if self._hashers is None:
            return
        for hasher, rows, digests in zip(self._hashers, (came, hidden), out.view(2, len(positions), 8), strict=True):
            hasher.hash(rows.view(torch.int32), positions, digests)
