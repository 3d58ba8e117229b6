"""How the rows of a step attend: one-row spans as decode rows, prompts in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.gpu.block import Block
from serve_app.engine.gpu.forward import Attend
from serve_app.engine.gpu.kernels.decode_attention import decode_attention
from serve_app.engine.gpu.kernels.prefill_attention import prefill_attention, rows_per_tile
from serve_app.engine.gpu.request_table import Ints, PlannedSpans

_PROGRAMS = 1024  # wanted at least, where one row can be split into parts: some per multiprocessor of a large GPU
_MAX_PARTS = 32
_FIXED_PARTS = 8  # where all rows must be split alike: long ones stay fast, and work space is 8 times a row's


class DecodeAttention:
    """Work space for up to max_rows rows, each split into up to _MAX_PARTS parts while they are few."""

    def __init__(self, blocks: Sequence[Block], max_rows: int, device: torch.device, fixed: bool = False) -> None:
        """fixed: a row is split by its length alone, whatever runs beside it."""
        self.max_rows, self._fixed = max_rows, fixed
        self._programs_of_row = max(b.kv_heads for b in blocks)
        heads, dim = max(b.heads for b in blocks), max(b.dim for b in blocks)
        n = max(rows * self.parts(rows) for rows in range(1, max_rows + 1))
        self._out = torch.empty(n * heads * dim, dtype=torch.float32, device=device)
        self._stat = torch.empty(n * heads * 2, dtype=torch.float32, device=device)

    def parts(self, rows: int) -> int:
        """Into how many parts a long row is split when there are so many rows."""
        if self._fixed:
            return _FIXED_PARTS
        parts = 1
        while parts < _MAX_PARTS and 2 * parts * rows * self._programs_of_row <= _PROGRAMS:
            parts *= 2
        return parts

    def bind(self, page_table: Tensor, slots: Tensor, lengths: Tensor, parts: int) -> Attend:
        """The function for these rows."""

        def attend(block: Block, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
            rows, heads, dim = q.shape
            # Halves of a head's dimensions as large as 256 leave less room for positions.
            positions = 128 if dim <= 128 else 64
            decode_attention(
                q,
                keys,
                values,
                page_table,
                slots,
                lengths,
                out=out,
                part_out=self._out[: rows * heads * parts * dim].view(rows, heads, parts, dim),
                part_stat=self._stat[: rows * heads * parts * 2].view(rows, heads, parts, 2),
                parts=parts,
                scale=block.scale,
                softcap=block.softcap,
                window=block.window,
                sinks=block.sinks,
                block=positions if parts == 1 else 32,
                warps=4 if parts == 1 else 2,
                stages=2 if parts == 1 else 5,
            )

        return attend


class RowAttention:
    """Every row as a decode row in a fixed number of parts, prompts included: the same bits in any company."""

    def __init__(self, decode: DecodeAttention, page_table: Tensor, slots: Tensor, positions: Tensor) -> None:
        self._decode, self._page_table, self._slots, self._lengths = decode, page_table, slots, positions + 1

    def __call__(self, block: Block, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        for first in range(0, len(q), self._decode.max_rows):  # what there is work space for
            now = slice(first, first + self._decode.max_rows)
            attend = self._decode.bind(self._page_table, self._slots[now], self._lengths[now], self._decode.parts(1))
            attend(block, q[now], keys, values, out[now])


class PrefillAttention:
    """Decode rows first, then the tiles of all other spans."""

    def __init__(
        self, decode: Attend, n_decode: int, page_table: Tensor, tiles: Sequence[Tensor], blocks: Sequence[Block]
    ) -> None:
        self._decode, self._n_decode, self._page_table = decode, n_decode, page_table
        self._tiles = dict(zip(tile_sizes(blocks), tiles, strict=True))

    def __call__(self, block: Block, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        n = self._n_decode
        if n:
            self._decode(block, q[:n], keys, values, out[:n])
        tiles = self._tiles[rows_per_tile(block.heads, block.kv_heads)]
        if len(tiles):
            prefill_attention(
                q,
                keys,
                values,
                self._page_table,
                tiles,
                out=out,
                scale=block.scale,
                softcap=block.softcap,
                window=block.window,
                sinks=block.sinks,
                block=64 if block.dim <= 128 else 32,
            )


def tile_sizes(blocks: Sequence[Block]) -> list[int]:
    """Rows a tile may hold, for each ratio of query to KV heads there is."""
    return sorted({rows_per_tile(b.heads, b.kv_heads) for b in blocks})


def tiles_of(blocks: Sequence[Block], spans: PlannedSpans, first: Ints, n_decode: int) -> list[Ints]:
    """For each tile size, [tiles * 4]: slot, first row, rows, position of that row, for spans from n_decode on."""
    slots, starts, counts, rows = (
        a[n_decode:].astype(np.int64) for a in (spans.slots, spans.starts, spans.counts, first)
    )
    out = []
    for size in tile_sizes(blocks):
        n = -(-counts // size)
        of = np.repeat(np.arange(len(counts)), n)
        at = (np.arange(len(of)) - np.repeat(np.cumsum(n) - n, n)) * size
        tiles = np.stack([slots[of], rows[of] + at, np.minimum(counts[of] - at, size), starts[of] + at], 1)
        # Longest reads first: what ends last should start first.
        tiles = tiles[np.argsort(-(tiles[:, 3] + tiles[:, 2]), kind="stable")]
        out.append(tiles.astype(np.int32).reshape(-1))
    return out
