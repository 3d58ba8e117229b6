"""One new row per sequence attends to all keys and values of its sequence, in pages.

Equals softmax(q k^T * scale) v over the positions the row may see, softmax in float32. Sequences are as unequal as
their users, so they are cut into chunks of one length, and a fixed number of programs take the next chunk when they are
done with one: all multiprocessors end together, however the lengths lie. Many small programs hide each other's waiting
for the first bytes of a chunk (3 to 12 % faster than few large ones, benchmarks/gpu_kernels.py). A program takes one
chunk for the query heads that share one KV head, so that keys are read once; a second launch joins the chunks of a row.
List, lengths and chunk length are made and read on the device, so that a CUDA graph may hold it all.
Source: the split-KV scheme of Dao et al. 2023, "Flash-Decoding for long-context inference"; work lists as in Ye et al.
2024, "FlashInfer", section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve_app.engine.gpu.kernels.early_launch import starts_early, wait_for_inputs

LOG2E = tl.constexpr(1.4426950408889634)
SHORTEST_CHUNK = 128  # positions: a shorter one costs more to start and to join than it saves
_FIXED_CHUNKS = 8  # of a row at most, where all must be cut alike: long ones stay fast
_TURNS = 8  # chunks for each program at most, unless the rows alone are more: enough to even out their lengths
_SHORT_TURNS = 3  # and of the shortest ones: with more to do, chunks of twice the length are faster
_PROGRAMS = 6  # on each multiprocessor: as many as find room with two blocks of keys and values each, at dim 128


@triton.jit(do_not_specialize=["n_rows", "few", "most"])
def _list_chunks(
    slots, lengths, n_rows, few, most, items, first_items, meta, SHORTEST: tl.constexpr, ROWS: tl.constexpr
):
    """One program. items: row, chunk, slot, length of each chunk in row order; meta: see ChunkSpace."""
    offs = tl.arange(0, ROWS)
    longest = 0
    for n in range(0, n_rows, ROWS):
        longest = tl.maximum(longest, tl.max(tl.load(lengths + n + offs, mask=n + offs < n_rows, other=0), 0))
    chunk = tl.zeros([], tl.int32) + SHORTEST
    total = 0
    for n in range(0, n_rows, ROWS):
        length = tl.load(lengths + n + offs, mask=n + offs < n_rows, other=0)
        total += tl.sum((length + chunk - 1) // chunk, 0)
    while (total > tl.where(chunk == SHORTEST, few, most)) & (chunk < longest):
        chunk = chunk * 2
        total = 0
        for n in range(0, n_rows, ROWS):
            length = tl.load(lengths + n + offs, mask=n + offs < n_rows, other=0)
            total += tl.sum((length + chunk - 1) // chunk, 0)
    before = 0
    for n in range(0, n_rows, ROWS):
        row = n + offs
        slot = tl.load(slots + row, mask=row < n_rows, other=0)
        length = tl.load(lengths + row, mask=row < n_rows, other=0)
        chunks = (length + chunk - 1) // chunk
        first = before + tl.cumsum(chunks, 0) - chunks
        tl.store(first_items + row, first, mask=row < n_rows)
        for c in range(tl.max(chunks, 0)):
            at = items + (first + c) * 4
            tl.store(at, row, mask=c < chunks)
            tl.store(at + 1, c + tl.zeros([ROWS], tl.int32), mask=c < chunks)
            tl.store(at + 2, slot, mask=c < chunks)
            tl.store(at + 3, length, mask=c < chunks)
        before += tl.sum(chunks, 0)
    tl.store(meta, total)
    tl.store(meta + 1, chunk)
    tl.store(meta + 2, 0)


@triton.jit
def _attend_chunks(
    q,
    keys,
    values,
    scales,
    out,
    part_out,
    part_stat,
    page_table,
    items,
    meta,
    sinks,
    scale,
    softcap,
    window,
    value_scales,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EIGHT: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    total = tl.load(meta) * KV_HEADS
    chunk = tl.load(meta + 1)
    offs_g = tl.arange(0, GROUP_PAD)
    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK)
    real = offs_g < GROUP
    turn = tl.program_id(0)
    while turn < total:
        item = turn // KV_HEADS
        head = turn % KV_HEADS
        row = tl.load(items + item * 4)
        mine = tl.load(items + item * 4 + 1)
        slot = tl.load(items + item * 4 + 2)
        length = tl.load(items + item * 4 + 3)
        begin = mine * chunk
        end = tl.minimum(begin + chunk, length)
        first = 0  # the first chunk that holds a position the row may see
        if HAS_WINDOW:
            first = tl.maximum(length - window, 0) // chunk
            begin = tl.maximum(begin, tl.maximum(length - window, 0) // BLOCK * BLOCK)

        heads = head * GROUP + offs_g
        q_at = (row * KV_HEADS * GROUP + heads)[:, None] * DIM + offs_d[None, :]
        query = tl.load(q + q_at, mask=real[:, None], other=0.0)
        table = page_table + slot.to(tl.int64) * table_stride

        top = tl.full([GROUP_PAD], -1e30, tl.float32)
        sum_ = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, DIM], tl.float32)
        for n in range(begin, end, BLOCK):
            at = n + offs_n
            seen = at < end
            if HAS_WINDOW:
                seen = seen & (at >= length - window)
            page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
            cell = (page * KV_HEADS + head) * PAGE + at % PAGE
            k = tl.load(keys + cell[None, :] * DIM + offs_d[:, None])
            scores = tl.dot(query, k.to(query.dtype), input_precision="ieee") * scale
            if EIGHT:
                scores *= tl.load(scales + cell)[None, :]
            if HAS_SOFTCAP:
                scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E) / softcap) + 1.0))
            scores = tl.where(seen[None, :], scores * LOG2E, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            weights = tl.where(seen[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
            v = tl.load(values + cell[:, None] * DIM + offs_d[None, :], mask=seen[:, None], other=0.0).to(query.dtype)
            sum_ = sum_ * shrink + tl.sum(weights, 1)
            if EIGHT:
                weights *= tl.load(scales + value_scales + cell, mask=seen, other=0.0)[None, :]
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        alone = (length + chunk - 1) // chunk - first == 1
        if alone & (mine == first):
            if HAS_SINKS:
                sum_ += tl.exp2(tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E - top)
            whole = acc / tl.where(sum_ > 0.0, sum_, 1.0)[:, None]
            tl.store(out + q_at, whole.to(out.dtype.element_ty), mask=real[:, None])
        elif mine >= first:
            at = (item * KV_HEADS * GROUP + heads).to(tl.int64)
            tl.store(part_out + at[:, None] * DIM + offs_d[None, :], acc, mask=real[:, None])
            tl.store(part_stat + at * 2, top, mask=real)
            tl.store(part_stat + at * 2 + 1, sum_, mask=real)
        turn = PROGRAMS + tl.atomic_add(meta + 2, 1, sem="relaxed")


@triton.jit
def _join_chunks(
    out,
    part_out,
    part_stat,
    lengths,
    first_items,
    meta,
    sinks,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    wait_for_inputs(EARLY)
    if (row == 0) & (head == 0):
        tl.store(meta + 2, 0)  # for the next layer
    length = tl.load(lengths + row)
    chunk = tl.load(meta + 1)
    n_chunks = (length + chunk - 1) // chunk
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // chunk
    if n_chunks - first < 2:
        return
    item = tl.load(first_items + row).to(tl.int64)
    offs_c = tl.arange(0, CHUNKS)
    offs_d = tl.arange(0, DIM)
    best = tl.full([], -1e30, tl.float32)
    whole = tl.full([], 0.0, tl.float32)
    joined = tl.zeros([DIM], tl.float32)
    for c in range(first, n_chunks, CHUNKS):
        real = c + offs_c < n_chunks
        at = (item + c + offs_c) * HEADS + head
        top = tl.load(part_stat + at * 2, mask=real, other=-1e30)
        total = tl.load(part_stat + at * 2 + 1, mask=real, other=0.0)
        acc = tl.load(part_out + at[:, None] * DIM + offs_d[None, :], mask=real[:, None], other=0.0)
        new_best = tl.maximum(best, tl.max(top, 0))
        shrink = tl.exp2(best - new_best)
        share = tl.where(real, tl.exp2(top - new_best), 0.0)
        whole = whole * shrink + tl.sum(total * share, 0)
        joined = joined * shrink + tl.sum(acc * share[:, None], 0)
        best = new_best
    if HAS_SINKS:
        whole += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - best)
    tl.store(out + (row * HEADS + head) * DIM + offs_d, (joined / whole).to(out.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class ChunkSpace:
    """Room for the chunks of up to so many rows. One step at a time; what is in it is made anew by list_chunks."""

    programs: int
    most: int  # chunks at most, unless the rows alone are more
    few: int  # of the shortest chunks at most
    shortest: int  # positions of these
    items: Tensor  # [chunks, 4] int32: row, number of the chunk, slot, length of the row
    first_items: Tensor  # [rows] int32
    meta: Tensor  # [3] int32: how many chunks, their length in positions, turns taken beyond each program's first
    part_out: Tensor  # [chunks * heads * dim] float32
    part_stat: Tensor  # [chunks * heads * 2] float32

    @classmethod
    def of(
        cls, max_rows: int, heads: int, kv_heads: int, dim: int, device: torch.device, fixed_for: int | None = None
    ) -> ChunkSpace:
        """heads, kv_heads, dim: the most of any layer (kv_heads: the least).

        fixed_for: positions that a row may have. All chunks are then of one length in every step, and a row's bits do
        not depend on what runs beside it.
        """
        # A CPU, in the interpreter, takes a few.
        programs = (
            _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
        )
        most, few = (max(turns * programs // kv_heads, 1) for turns in (_TURNS, _SHORT_TURNS))
        shortest = SHORTEST_CHUNK
        if fixed_for is not None:
            chunk = triton.next_power_of_2(-(-fixed_for // _FIXED_CHUNKS))
            most = few = _FIXED_CHUNKS * max_rows
            shortest = max(chunk, SHORTEST_CHUNK)
        chunks = max(most, max_rows)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            programs=programs,
            most=most,
            few=few,
            shortest=shortest,
            items=ints(chunks, 4),
            first_items=ints(max_rows),
            meta=ints(3),
            part_out=torch.zeros(chunks * heads * dim, dtype=torch.float32, device=device),
            part_stat=torch.zeros(chunks * heads * 2, dtype=torch.float32, device=device),
        )


def list_chunks(slots: Tensor, lengths: Tensor, space: ChunkSpace) -> None:
    """What the rows of a step are cut into, for all its layers. lengths [rows] int32, 0 for a row to leave alone."""
    _list_chunks[(1,)](
        slots,
        lengths,
        len(lengths),
        space.few,
        space.most,
        space.items,
        space.first_items,
        space.meta,
        SHORTEST=space.shortest,
        ROWS=256,
        num_warps=4,
    )


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    out: Tensor,
    space: ChunkSpace,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scales: Tensor | None = None,
    block: int | None = None,
    warps: int | None = None,
    stages: int = 2,
) -> None:
    """Write to out [rows, heads, dim]; row i is the last position of a sequence.

    q [rows, heads, dim]; keys, values [pages, kv_heads, page, dim]; page_table [slots, pages of a sequence] int32;
    lengths [rows] int32, the new row counted, as list_chunks has seen them, and the slots with them. dim and block are
    powers of two. scales: of 8-bit pages, as rope.py has them.
    """
    rows, heads, dim = q.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    group, early = heads // kv_heads, starts_early(rows)
    group_pad = max(16, triton.next_power_of_2(group))
    warps = warps or min(max(group_pad * dim // 2048, 1), 4)  # the sums of a program then fit into its registers
    block = block or max(4096 // dim, 16)
    _attend_chunks[(space.programs,)](
        q,
        keys,
        values,
        scales,
        out,
        space.part_out,
        space.part_stat,
        page_table,
        space.items,
        space.meta,
        sinks,
        scale,
        softcap or 0.0,
        window or 0,
        scales.stride(0) if scales is not None else 0,
        page_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=group_pad,
        DIM=dim,
        PAGE=page,
        PROGRAMS=space.programs,
        BLOCK=block,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        EIGHT=scales is not None,
        num_warps=warps,
        num_stages=stages,
        EARLY=early,
        launch_pdl=early,
    )
    _join_chunks[(rows, heads)](
        out,
        space.part_out,
        space.part_stat,
        lengths,
        space.first_items,
        space.meta,
        sinks,
        window or 0,
        HEADS=heads,
        DIM=dim,
        CHUNKS=8,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        num_warps=2,
        EARLY=early,
        launch_pdl=early,
    )
