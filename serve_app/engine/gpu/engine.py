"""The engine for GPUs: paged attention and sampling by our kernels, decode steps as CUDA graphs, nothing waited for.

A step of one row per sequence replays a graph of its batch size; every other step launches the same kernels one by
one. What a step draws stays on the device for the next step (DRAWN_LAST), so `launch` returns as soon as the work is
queued; results come back in memory that nobody writes again. Weights and their checks are the plain engine's
(torch_engine.py), whose modules this one reads and keeps whole.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from serve_app.engine.engine import StepOutput
from serve_app.engine.gpu.attend import DecodeAttention, PrefillAttention, tiles_of
from serve_app.engine.gpu.forward import Pages, Space, head_product, norm, part, run_layers
from serve_app.engine.gpu.kernels.prepare import N_FIELDS, prepare
from serve_app.engine.gpu.kernels.row_hash import RowHasher
from serve_app.engine.gpu.kernels.sampler import SamplerSpace, sample
from serve_app.engine.gpu.request_table import Ints, PlannedSpans, RequestTable
from serve_app.engine.gpu.stage_weights import StageWeights
from serve_app.engine.torch_engine import TORCH_DTYPES, TorchEngine
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import DRAWN_LAST, StepPlan

_log = logging.getLogger(__name__)
_LONG = 1024  # positions: above it, decode attention of few rows is split
_NO_IDS = np.zeros(0, np.int32)


def batch_sizes(max_sequences: int) -> list[int]:
    """For which numbers of rows a graph is made; a step takes the next larger one."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_sequences + 16, 16)]
    return sorted({min(size, max_sequences) for size in sizes})


@dataclass(frozen=True, slots=True)
class _Replay:
    graph: torch.cuda.CUDAGraph | None  # None: the device has none, the same calls are made one by one
    rows: int
    parts: int


@dataclass(frozen=True, slots=True)
class _RowDigests:
    """Implements engine.Digests. both: [2, rows, 8] int32, on the host once `ended` has happened."""

    both: Tensor
    ended: torch.cuda.Event | None

    def wait(self) -> tuple[memoryview, memoryview]:
        if self.ended is not None:
            self.ended.synchronize()
        inlet, outlet = self.both.view(torch.uint8).numpy().reshape(2, -1)
        return inlet.data, outlet.data


@dataclass(frozen=True, slots=True)
class _Flight:
    """Implements engine.Launched. report: ids then tokens, on the host once `ended` has happened."""

    received: memoryview | None  # None: the ids in the report
    rows: int
    n_tokens: int
    hidden: Tensor | None
    report: Tensor
    ended: torch.cuda.Event | None
    digests: _RowDigests | None

    def result(self) -> StepOutput:
        if self.ended is not None:
            self.ended.synchronize()
        report = self.report.numpy()
        tokens = report[len(report) - self.n_tokens :].tolist()
        if any(token < 0 for token in tokens):
            raise PipelineError("the last stage computed logits that are not finite")
        received = self.received
        if received is None:
            received = report[: self.rows].data.cast("B")
        hidden = memoryview(b"")
        if self.hidden is not None:
            hidden = self.hidden.view(torch.uint8).numpy().reshape(-1).data
        return StepOutput(received, hidden, tuple(tokens), self.digests)


class GpuEngine:
    """Implements engine.Engine."""

    def __init__(self, plain: TorchEngine, weights: StageWeights, page_size: int) -> None:
        """weights: of the plain engine, as stage_weights.read_weights has checked them."""
        profile = plain.profile
        self.logits_of = plain.logits_of
        self._weights, self._page_size = weights, page_size
        self.timings: dict[str, float] = {}  # parts of the start-up, seconds
        self._device, self._dtype = weights.device, TORCH_DTYPES[profile.dtype]
        self._row_bytes = 4 if weights.embedding is not None else profile.hidden_size * self._dtype.itemsize
        self._hidden_size = profile.hidden_size
        item = self._dtype.itemsize
        self.profile = replace(
            profile,
            description=f"{profile.description}, llmd_triton {triton.__version__}",
            kv_page_bytes=sum(2 * b.kv_heads * page_size * b.dim * item for b in weights.blocks),
        )
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        # Hashing a row takes longer than a small step, on a single lane: it runs beside the next step.
        self._hash_stream = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._hashers: tuple[RowHasher, RowHasher] | None = None
        self._hand_on = True
        self._spaces: Space | None = None
        self._replays: dict[tuple[int, bool], _Replay] = {}

    @torch.inference_mode()
    def reserve(self, n_pages: int, max_sequences: int) -> None:
        weights, device = self._weights, self._device
        self._max_rows = max_sequences
        self._pages = Pages(weights.blocks, n_pages, self._page_size, device, self._dtype)
        # Sequences that end are closed by a later plan, and new ones may open before that.
        self._table = RequestTable(2 * max_sequences + 16, n_pages, self._page_size, weights.context_length, device)
        self._space = Space(max_sequences, weights.blocks, self._hidden_size, device, self._dtype)
        self._fields = torch.zeros(N_FIELDS * max_sequences, dtype=torch.int32, device=device)
        self._report = torch.zeros(2 * max_sequences, dtype=torch.int32, device=device)
        self._slots, self._positions, self._lengths = (
            torch.zeros(max_sequences, dtype=torch.int32, device=device) for _ in range(3)
        )
        self._arrived = torch.zeros((max_sequences, self._hidden_size), dtype=self._dtype, device=device)
        self._decode = DecodeAttention(weights.blocks, max_sequences, device)
        if weights.head is not None:
            self._logits = torch.zeros((max_sequences, len(weights.head)), dtype=self._dtype, device=device)
            self._sampler = SamplerSpace(max_sequences, len(weights.head), device)
        began = time.perf_counter()
        with self._on_stream():
            self._make_replays(batch_sizes(max_sequences))
        self.timings["graphs_s"] = time.perf_counter() - began

    @torch.inference_mode()
    def launch(self, plan: StepPlan, rows: memoryview) -> _Flight:
        if len(rows) != plan.rows * self._row_bytes:
            raise ProtocolError(f"{len(rows)} bytes for {plan.rows} rows of {self._row_bytes}")
        ids = self._ids(rows) if self._weights.embedding is not None else _NO_IDS
        spans = self._table.begin(plan)
        try:
            with self._on_stream():
                later = np.flatnonzero(ids < 0)
                if len(later):
                    self._check_drawn(spans, later)
                if not len(plan.opens) and self._is_decode(spans):
                    flight = self._run_decode(spans, ids, rows)
                else:
                    flight = self._run_mixed(plan, spans, ids, rows)
        except BaseException:
            self._table.undo(plan, spans)
            raise
        if self._weights.head is not None:
            self._table.drew[spans.slots[spans.samples]] = True
        self._table.end(plan)
        return flight

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        self._hashers = (
            RowHasher(inlet, self._row_bytes, self._device),
            RowHasher(outlet, self._hidden_size * self._dtype.itemsize, self._device),
        )
        self._hand_on = hand_on
        return True

    def run(self, plan: StepPlan, rows: memoryview) -> StepOutput:
        """The step, waited for."""
        return self.launch(plan, rows).result()

    def _ids(self, rows: memoryview) -> Ints:
        """Token ids as int32, -1 for DRAWN_LAST."""
        ids = np.frombuffer(rows, "<u4")
        known = ids[ids != DRAWN_LAST]
        if len(known) and int(known.max()) >= self._weights.vocab_size:
            raise ProtocolError(f"token id {int(known.max())} in a vocabulary of {self._weights.vocab_size}")
        return ids.view("<i4")

    def _check_drawn(self, spans: PlannedSpans, later: npt.NDArray[np.intp]) -> None:
        of = np.searchsorted(np.cumsum(spans.counts), later, "right")
        if self._weights.head is None or not self._table.drew[spans.slots[of]].all():
            raise ProtocolError("a row of a token drawn last, of a sequence that has drawn none here")

    def _is_decode(self, spans: PlannedSpans) -> bool:
        """Whether each row is the next of a sequence, takes a page only where one begins and, with a head, draws."""
        n, starts_page = len(spans.counts), spans.starts % self._page_size == 0
        return bool(
            0 < n <= self._max_rows
            and (spans.counts == 1).all()
            and (spans.new_pages == starts_page).all()
            and (self._weights.head is None or spans.samples.all())
        )

    def _run_decode(self, spans: PlannedSpans, ids: Ints, rows: memoryview) -> _Flight:
        n = len(spans.slots)
        size = next(size for size in self._sizes if size >= n)
        fields = np.empty((N_FIELDS, size), np.int32)
        fields[0], fields[1], fields[2], fields[3] = 0, -1, 0, -1
        if len(ids):
            fields[0, :n] = ids
        fields[1, :n], fields[2, :n] = spans.slots, spans.starts
        fields[3, :n][spans.new_pages == 1] = spans.pages
        self._upload(fields, self._fields[: N_FIELDS * size])
        if self._weights.embedding is None:
            self._upload_rows(rows, n, self._arrived)
        replay = self._replays[size, int(spans.starts.max()) >= _LONG]
        if replay.graph is not None:
            replay.graph.replay()
        else:
            self._decode_step(replay.rows, replay.parts)
        report = self._report[: 2 * size]
        n_tokens = n if self._weights.head is not None else 0
        came = report[:n] if self._weights.embedding is not None else self._arrived[:n]
        return self._download(
            rows, report.view(2, size)[:, :n], n_tokens, came, self._space.residual[:n], self._positions[:n]
        )

    def _decode_step(self, rows: int, parts: int) -> None:
        """What a graph holds: everything from one plan's fields to its report."""
        weights, table = self._weights, self._table
        report = self._report[: 2 * rows].view(2, rows)
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
        )
        self._enter(report[0], self._arrived[:rows], self._space.residual[:rows])
        attend = self._decode.bind(table.page_table, slots, lengths, parts)
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
        )
        if weights.head is not None:
            self._draw(self._space.x[:rows], slots, positions, report[1])

    def _run_mixed(self, plan: StepPlan, spans: PlannedSpans, ids: Ints, rows: memoryview) -> _Flight:
        """A step with prompts in it: the rows of one-row spans at its start attend as decode rows do."""
        weights, table, n = self._weights, self._table, plan.rows
        if n == 0:
            return _Flight(None, 0, 0, None, torch.empty(0, dtype=torch.int32), None, None)
        first = np.cumsum(spans.counts) - spans.counts
        n_decode = int(np.argmax(spans.counts > 1)) if (spans.counts > 1).any() else len(spans.counts)
        n_decode = min(n_decode, self._max_rows)
        row_slots = np.repeat(spans.slots, spans.counts)
        positions = (np.repeat(spans.starts - first, spans.counts) + np.arange(n)).astype(np.int32)
        tiles = tiles_of(weights.blocks, spans, first, n_decode)
        drawn = (first + spans.counts - 1)[spans.samples].astype(np.int32) if weights.head is not None else _NO_IDS
        opened = table.opened(plan)
        flat = self._upload_all(
            ids, row_slots, positions, spans.page_places, spans.pages, *tiles, drawn, opened.reshape(-1)
        )
        d_ids, d_slots, d_positions, d_places, d_pages, *d_tiles, d_drawn, d_opened = flat
        if len(opened):
            table.write_opened(d_opened.view(-1, 6))
        if len(spans.pages):
            table.write_pages(d_places, d_pages)
        if len(ids):
            d_ids = torch.where(d_ids < 0, table.last_tokens[d_slots.long()], d_ids)
        space = self._space_for(n)
        arrived = torch.empty((0, self._hidden_size), device=self._device, dtype=self._dtype)
        if weights.embedding is None:
            arrived = torch.empty((n, self._hidden_size), device=self._device, dtype=self._dtype)
            self._upload_rows(rows, n, arrived)
        self._enter(d_ids, arrived, space.residual[:n])
        decode = self._decode.bind(table.page_table, d_slots[:n_decode], d_positions[:n_decode] + 1, 1)
        attend = PrefillAttention(decode, n_decode, table.page_table, [t.view(-1, 4) for t in d_tiles], weights.blocks)
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
        )
        tokens = torch.empty(len(drawn), dtype=torch.int32, device=self._device)
        if len(drawn):
            at = d_drawn.long()
            x = torch.empty((len(drawn), self._hidden_size), device=self._device, dtype=self._dtype)
            assert weights.final is not None
            norm(space.residual[:n].index_select(0, at), weights.final, x)
            for i in range(0, len(drawn), self._max_rows):
                now = slice(i, i + self._max_rows)
                self._draw(x[now], d_slots[at[now]], d_positions[at[now]], tokens[now])
        report = torch.cat([d_ids, tokens])
        came = d_ids if weights.embedding is not None else arrived
        return self._download(rows, report, len(drawn), came, space.residual[:n], d_positions)

    def _enter(self, ids: Tensor, arrived: Tensor, out: Tensor) -> None:
        """The rows that go into the first layer."""
        weights = self._weights
        if weights.embedding is None:
            out.copy_(arrived)
            return
        torch.index_select(weights.embedding, 0, ids, out=out)
        if weights.embedding_scale != 1.0:
            out.mul_(weights.embedding_scale)

    def _draw(self, x: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        weights, table = self._weights, self._table
        assert weights.head is not None
        logits = part(self._logits, len(x), len(weights.head))
        head_product(x, weights.head, logits)
        if weights.logit_cap is not None:
            torch.tanh(logits.div_(weights.logit_cap), out=logits).mul_(weights.logit_cap)
        temperature, top_k, top_p = table.draws
        sample(
            logits,
            slots,
            positions,
            temperature_micro=temperature,
            top_k=top_k,
            top_p_micro=top_p,
            keys=table.keys,
            tokens=tokens,
            last_tokens=table.last_tokens,
            space=self._sampler,
        )

    def _make_replays(self, sizes: list[int]) -> None:
        self._sizes = sizes
        pool = None
        for size in reversed(sizes):  # the largest first: the others then fit into its memory
            for long in (False, True):
                parts = self._decode.parts(size) if long else 1
                if long and parts == 1:
                    self._replays[size, True] = self._replays[size, False]
                    continue
                graph = None
                if self._cuda:
                    self._fields[: N_FIELDS * size].view(N_FIELDS, size).copy_(_padding(size, self._device))
                    self._decode_step(size, parts)  # compiles what is new, and lets libraries choose
                    torch.cuda.synchronize(self._device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                        self._decode_step(size, parts)
                    pool = graph.pool()
                self._replays[size, long] = _Replay(graph, size, parts)

    def _space_for(self, rows: int) -> Space:
        if self._spaces is None or self._spaces.rows < rows:
            self._spaces = None  # first, so that both are never held
            self._spaces = Space(
                -(-rows // 256) * 256, self._weights.blocks, self._hidden_size, self._device, self._dtype
            )
        return self._spaces

    def _upload(self, host: Ints, device: Tensor) -> None:
        tensor = torch.from_numpy(host.reshape(-1))
        device.copy_(tensor.pin_memory() if self._cuda else tensor, non_blocking=True)

    def _upload_all(self, *arrays: Ints) -> list[Tensor]:
        """Several arrays in one copy."""
        whole = np.concatenate(arrays).astype(np.int32, copy=False)
        device = torch.empty(len(whole), dtype=torch.int32, device=self._device)
        self._upload(whole, device)
        return list(torch.split(device, [len(a) for a in arrays]))

    def _upload_rows(self, rows: memoryview, n: int, device: Tensor) -> None:
        host = torch.empty((n, self._hidden_size), dtype=self._dtype, pin_memory=self._cuda)
        host.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(rows, np.uint8)
        device[:n].copy_(host, non_blocking=True)

    def _download(
        self, rows: memoryview, report: Tensor, n_tokens: int, came: Tensor, hidden: Tensor, positions: Tensor
    ) -> _Flight:
        """Start the copies to the host; report holds ids, then tokens, and came what went into the first layer."""
        digests = self._hash(came, hidden, positions) if self._hashers is not None else None
        to_host = torch.empty(report.numel(), dtype=torch.int32, pin_memory=self._cuda)
        to_host.view(report.shape).copy_(report, non_blocking=True)
        hidden_host = None
        if self._hand_on:
            hidden_host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._cuda)
            hidden_host.copy_(hidden, non_blocking=True)
        received = None if self._weights.embedding is not None else rows
        return _Flight(received, len(hidden), n_tokens, hidden_host, to_host, _mark(self._cuda), digests)

    def _hash(self, came: Tensor, hidden: Tensor, positions: Tensor) -> _RowDigests:
        assert self._hashers is not None
        n = len(hidden)
        # The next step writes over these, so the hashes are of copies.
        came, hidden, positions = came.clone(), hidden.clone(), positions.clone()
        both = torch.empty((2, n, 8), dtype=torch.int32, device=self._device)
        host = torch.empty((2, n, 8), dtype=torch.int32, pin_memory=self._cuda)
        with self._beside(came, hidden, positions, both):
            for hasher, rows, out in zip(self._hashers, (came, hidden), both, strict=True):
                hasher.hash(rows.view(torch.int32), positions, out)
            host.copy_(both, non_blocking=True)
            return _RowDigests(host, _mark(self._cuda))

    @contextlib.contextmanager
    def _beside(self, *used: Tensor) -> Iterator[None]:
        """Inside: work that waits for what was queued so far, and for which later steps do not wait."""
        if self._hash_stream is None:
            yield
            return
        self._hash_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._hash_stream):
            yield
        for tensor in used:
            tensor.record_stream(self._hash_stream)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


def _mark(cuda: bool) -> torch.cuda.Event | None:
    """What has happened once all that was queued on this stream has."""
    if not cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _padding(size: int, device: torch.device) -> Tensor:
    rows = torch.tensor([0, -1, 0, -1], dtype=torch.int32, device=device)
    return rows[:, None].expand(N_FIELDS, size)
