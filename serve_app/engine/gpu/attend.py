"""How the rows of a step attend: one-row spans as decode rows, prompts in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.block import Block
from serve_app.engine.gpu.forward import Attend, Kept
from serve_app.engine.gpu.kernels.decode_attention import ChunkSpace, decode_attention, list_chunks
from serve_app.engine.gpu.kernels.prefill_attention import prefill_attention, rows_per_tile
from serve_app.engine.request_table import Ints, PlannedSpans


class DecodeAttention:
    """Work space for up to max_rows rows."""

    def __init__(
        self, blocks: Sequence[Block], max_rows: int, device: torch.device, fixed_for: int | None = None
    ) -> None:
        """fixed_for: positions a row may have; all rows are then cut alike, whatever runs beside them."""
        self.max_rows = max_rows
        heads, dim = max(b.heads for b in blocks), max(b.dim for b in blocks)
        self._space = ChunkSpace.of(max_rows, heads, min(b.kv_heads for b in blocks), dim, device, fixed_for)

    def bind(self, page_table: Tensor, slots: Tensor, lengths: Tensor) -> Attend:
        """The function for these rows, in all layers of this step: the next bind ends it."""
        list_chunks(slots, lengths, self._space)

        def attend(block: Block, q: Tensor, kept: Kept, out: Tensor) -> None:
            decode_attention(
                q,
                kept.keys,
                kept.values,
                page_table,
                lengths,
                out=out,
                space=self._space,
                scale=block.scale,
                softcap=block.softcap,
                window=block.window,
                sinks=block.sinks,
                scales=kept.scales,
            )

        return attend


class RowAttention:
    """Every row as a decode row, cut by its length alone, prompts included: the same bits in any company."""

    def __init__(self, decode: DecodeAttention, page_table: Tensor, slots: Tensor, positions: Tensor) -> None:
        self._decode, self._page_table, self._slots, self._lengths = decode, page_table, slots, positions + 1

    def __call__(self, block: Block, q: Tensor, kept: Kept, out: Tensor) -> None:
        for first in range(0, len(q), self._decode.max_rows):  # what there is work space for
            now = slice(first, first + self._decode.max_rows)
            attend = self._decode.bind(self._page_table, self._slots[now], self._lengths[now])
            attend(block, q[now], kept, out[now])


class PrefillAttention:
    """Decode rows first, then the tiles of all other spans."""

    def __init__(
        self, decode: Attend, n_decode: int, page_table: Tensor, tiles: Sequence[Tensor], blocks: Sequence[Block]
    ) -> None:
        self._decode, self._n_decode, self._page_table = decode, n_decode, page_table
        self._tiles = dict(zip(tile_sizes(blocks), tiles, strict=True))

    def __call__(self, block: Block, q: Tensor, kept: Kept, out: Tensor) -> None:
        n = self._n_decode
        if n:
            self._decode(block, q[:n], kept, out[:n])
        tiles = self._tiles[rows_per_tile(block.heads, block.kv_heads)]
        if len(tiles):
            prefill_attention(
                q,
                kept.keys,
                kept.values,
                self._page_table,
                tiles,
                out=out,
                scale=block.scale,
                softcap=block.softcap,
                window=block.window,
                sinks=block.sinks,
                scales=kept.scales,
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
