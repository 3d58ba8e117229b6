"""Bias and penalties of the rows that ask for them, by engine/penalties.py's rule, bit for bit; other rows cost a look.

What a sequence holds is read from its tokens, which lie in pages beside its keys: nothing is counted up or down, so
nothing can drift from what was drawn, whatever is replayed or opened again. A row that asks gets float32 logits of
its own, which the sampler then reads in place of the model's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

N_CONTROLS = 6  # int32 by slot: whether logits change, presence, frequency, repetition, prompt's tokens, biases
_BLOCK = 4096  # of the vocabulary
_PARTS = 8  # programs that share a row's blocks: one wave of a GPU where most only look and leave
_CHUNK = 1024  # of a sequence's tokens
_FEW = 64  # biases at a time


@triton.jit
def _counted(history, pages, start, stop, first_id, PAGE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """[BLOCK] int32: how often each id from first_id on stands at positions [start, stop)."""
    counts = tl.zeros([BLOCK], tl.int32)
    for at in range(start, stop, CHUNK):
        position = at + tl.arange(0, CHUNK)
        here = position < stop
        page = tl.load(pages + position // PAGE, mask=here, other=0)
        token = tl.load(history + page.to(tl.int64) * PAGE + position % PAGE, mask=here, other=-1)
        inside = here & (token >= first_id) & (token < first_id + BLOCK)
        counts += tl.histogram(tl.where(inside, token - first_id, 0), BLOCK, mask=inside)
    return counts


@triton.jit(do_not_specialize=["n_vocab", "table_stride"])
def _apply(
    logits,
    slots,
    positions,
    controls,
    biases,
    history,
    page_table,
    own_at,
    n_vocab,
    table_stride,
    FIELDS: tl.constexpr,
    MAX_BIASES: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    mine = controls + slot * FIELDS
    if tl.load(mine) == 0:
        return
    presence = tl.load(mine + 1).to(tl.int64)
    frequency = tl.load(mine + 2).to(tl.int64)
    repetition = tl.load(mine + 3)
    n_prompt = tl.load(mine + 4)
    n_biases = tl.load(mine + 5)
    base = row.to(tl.int64) * n_vocab
    own = tl.load(own_at).to(tl.pointer_type(tl.float32)) + base
    offs = tl.arange(0, BLOCK)
    for first in range(part * BLOCK, n_vocab, PARTS * BLOCK):
        ids = first + offs
        x = tl.load(logits + base + ids, mask=ids < n_vocab, other=0.0).to(tl.float32)
        tl.store(own + ids, x, mask=ids < n_vocab)
    tl.debug_barrier()
    for first in range(0, n_biases, FEW):
        at = first + tl.arange(0, FEW)
        pair = biases + (slot.to(tl.int64) * MAX_BIASES + at) * 2
        ids = tl.load(pair, mask=at < n_biases, other=0)
        here = (at < n_biases) & ((ids // BLOCK) % PARTS == part)
        micro = tl.load(pair + 1, mask=here, other=0).to(tl.float64)
        x = tl.load(logits + base + ids, mask=here, other=0.0).to(tl.float32).to(tl.float64)
        tl.store(own + ids, (x + micro / 1e6).to(tl.float32), mask=here)
    tl.debug_barrier()
    if (presence == 0) & (frequency == 0) & (repetition == 1000000):
        return
    n = tl.load(positions + row) + 1  # tokens so far
    pages = page_table + slot.to(tl.int64) * table_stride
    for first in range(part * BLOCK, n_vocab, PARTS * BLOCK):
        ids = first + offs
        drawn = _counted(history, pages, n_prompt, n, first, PAGE, BLOCK, CHUNK)
        held = drawn
        if repetition != 1000000:
            held += _counted(history, pages, 0, n_prompt, first, PAGE, BLOCK, CHUNK)
        changes = (held > 0) & (ids < n_vocab)
        x = tl.load(own + ids, mask=changes, other=0.0).to(tl.float64)
        if repetition != 1000000:
            by = repetition.to(tl.float64)
            x = tl.where(x > 0, x * 1e6 / by, x * by / 1e6)
        owed = tl.where(drawn > 0, presence + frequency * drawn.to(tl.int64), 0)
        tl.store(own + ids, (x - owed.to(tl.float64) / 1e6).to(tl.float32), mask=changes)


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    controls: Tensor,
    biases: Tensor,
    history: Tensor,
    page_table: Tensor,
    page_size: int,
    own_at: Tensor,
) -> None:
    """For rows whose slot says so, float32 logits [rows, vocab] are written where own_at points.

    logits [rows, vocab] of any float type; slots, positions [rows] int32, a row of a negative slot is left alone; by
    slot: controls [slots, N_CONTROLS], biases [slots, most, 2] int32 (id, millionths); history [pages * page_size]
    int32, the token at each place; own_at [1] int64, the address of what is written, read only if a row asks.
    """
    rows, n_vocab = logits.shape
    _apply[(rows, _PARTS)](
        logits,
        slots,
        positions,
        controls,
        biases,
        history,
        page_table,
        own_at,
        n_vocab,
        page_table.stride(0),
        FIELDS=N_CONTROLS,
        MAX_BIASES=biases.shape[1],
        PAGE=page_size,
        BLOCK=_BLOCK,
        PARTS=_PARTS,
        CHUNK=_CHUNK,
        FEW=_FEW,
        num_warps=8,
    )
