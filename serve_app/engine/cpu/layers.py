"""The layers of one stage in few torch operators: what is the same for every step is made once, here.

A token costs about 15 dispatched operators a layer, besides the products. Keys and values of one position lie side by
side, so that one operator rotates queries and keys and another keeps keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from serve_app.engine.attention import attend
from serve_app.engine.block import Block, Linear, Norm
from serve_app.engine.cpu.products import Product
from serve_app.engine.request_table import Ints, PlannedSpans


@dataclass(frozen=True, slots=True)
class Reach:
    """Rows [row, row + count) are the last of a sequence of `length` positions, whose keys lie at `places`.

    places: a slice of the cache where the sequence's pages are one run, so that nothing is gathered; else indices.
    """

    row: int
    count: int
    length: int
    places: slice | Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Where the rows of one step belong. write: [rows] int64, the place in the cache of each."""

    positions: Tensor
    write: Tensor
    reaches: tuple[Reach, ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """By position: what a row of [heads, dim] is multiplied with, and what its other half is. [positions, dim]."""

    cos: Tensor
    sin: Tensor  # negative in the first half
    other: Tensor  # [dim]: the column that each column is rotated with; itself where nothing is rotated


@dataclass(frozen=True, slots=True)
class Layer:
    """A block with its products, ready to run."""

    block: Block
    rotation: Rotation
    qkv: Product
    out: Product
    gate_up: Product
    down: Product


def layer_of(block: Block, rotations: dict[int, Rotation], products: Sequence[Product]) -> Layer:
    """products: qkv, out, gate_up, down; the layer does not hold the block's own matrices.

    rotations: those made already, by the identity of a block's table, to be shared.
    """
    key = id(block.cos)
    if key not in rotations:
        rotations[key] = _rotation_of(block)
    qkv, out, gate_up, down = products
    return Layer(without_matrices(block), rotations[key], qkv, out, gate_up, down)


def without_matrices(block: Block) -> Block:
    """The block with nothing in place of its matrices, whose memory may then go."""
    none = Linear(block.norm_in.weight.new_empty(0), None)
    return replace(block, qkv=none, out=none, gate_up=none, down=none)


def _rotation_of(block: Block) -> Rotation:
    dtype, (positions, half) = block.norm_in.weight.dtype, block.cos.shape
    cos, sin = torch.ones((positions, block.dim), dtype=dtype), torch.zeros((positions, block.dim), dtype=dtype)
    cos[:, :half], cos[:, half : 2 * half] = block.cos, block.cos
    sin[:, :half], sin[:, half : 2 * half] = -block.sin, block.sin
    other = torch.arange(block.dim)
    other[:half], other[half : 2 * half] = torch.arange(half, 2 * half), torch.arange(half)
    return Rotation(cos, sin, other)


def new_cache(blocks: Sequence[Block], n_slots: int, dtype: torch.dtype) -> list[Tensor]:
    """Of each layer [slots, 2 * kv_heads, dim]: keys, then values. Memory that is not written is not taken."""
    return [torch.empty((n_slots, 2 * b.kv_heads, b.dim), dtype=dtype) for b in blocks]


def step_of(spans: PlannedSpans, page_table: Ints, page_size: int) -> Step:
    """page_table: [slots, pages], of which the step's own pages are already part."""
    n, first = int(spans.counts.sum()), np.cumsum(spans.counts) - spans.counts
    positions = np.repeat(spans.starts - first, spans.counts).astype(np.int64) + np.arange(n)
    owners = np.repeat(spans.slots, spans.counts)
    write = page_table[owners, positions // page_size].astype(np.int64) * page_size + positions % page_size
    reaches = []
    for row, slot, start, count in zip(first.tolist(), spans.slots, spans.starts.tolist(), spans.counts, strict=True):
        length = start + int(count)
        pages = page_table[slot, : -(-length // page_size)]
        reaches.append(Reach(row, int(count), length, _places(pages, length, page_size)))
    return Step(torch.from_numpy(positions), torch.from_numpy(write), tuple(reaches))


def _places(pages: Ints, length: int, page_size: int) -> slice | Tensor:
    begin = int(pages[0])
    if (np.diff(pages) == 1).all():
        return slice(begin * page_size, begin * page_size + length)
    slots = pages.astype(np.int64)[:, None] * page_size + np.arange(page_size)
    return torch.from_numpy(slots.reshape(-1)[:length])


def run_layers(layers: Sequence[Layer], cache: Sequence[Tensor], step: Step, x: Tensor) -> Tensor:
    """x: [rows, hidden], which leave the embedding or came from the stage before; overwritten. Returns what leaves."""
    turned: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, kept in zip(layers, cache, strict=True):
        block, key = layer.block, id(layer.rotation)
        if key not in turned:
            turned[key] = _turn(layer, step.positions)
        rows = layer.qkv(normed(x, block.norm_in)).view(len(x), -1, block.dim)
        y = layer.out(_attention(layer, rows, kept, step, *turned[key]))
        x.add_(y if block.after_attention is None else normed(y, block.after_attention))
        gate, up = layer.gate_up(normed(x, block.norm_mid)).chunk(2, -1)
        gate = silu(gate) if block.activation == "silu" else gelu(gate, approximate="tanh")
        y = layer.down(gate.mul_(up))
        x.add_(y if block.after_mlp is None else normed(y, block.after_mlp))
    return x


def _turn(layer: Layer, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each row and head, [rows, heads, dim]: of values 1 and 0."""
    block, rotation = layer.block, layer.rotation
    cos, sin = (t.index_select(0, positions)[:, None] for t in (rotation.cos, rotation.sin))
    turning, still = block.heads + block.kv_heads, block.kv_heads
    shape = (len(positions), still, block.dim)
    return (
        torch.cat((cos.expand(-1, turning, -1), cos.new_ones(shape)), 1),
        torch.cat((sin.expand(-1, turning, -1), sin.new_zeros(shape)), 1),
    )


def _attention(layer: Layer, rows: Tensor, kept: Tensor, step: Step, cos: Tensor, sin: Tensor) -> Tensor:
    """rows: [rows, heads + 2 * kv_heads, dim] -> [rows, heads * dim]."""
    block = layer.block
    if block.q_norm is not None and block.k_norm is not None:
        keys_end = block.heads + block.kv_heads
        rows[:, : block.heads] = normed(rows[:, : block.heads], block.q_norm)
        rows[:, block.heads : keys_end] = normed(rows[:, block.heads : keys_end], block.k_norm)
    if 2 * block.cos.shape[1] == block.dim:
        others = rows.roll(block.dim // 2, -1)
    else:
        others = rows.index_select(-1, layer.rotation.other)
    rows = torch.addcmul(rows * cos, others, sin)
    kept.index_copy_(0, step.write, rows[:, block.heads :])
    out = rows.new_empty((len(rows), block.heads, block.dim))
    for reach in step.reaches:
        reached, window = kept[reach.places], block.window
        if window is not None and reach.count == 1 and reach.length > window:
            reached = reached[-window:]
        q = rows[reach.row : reach.row + reach.count, : block.heads].transpose(0, 1)
        k, v = reached[:, : block.kv_heads].transpose(0, 1), reached[:, block.kv_heads :].transpose(0, 1)
        attended = attend(q, k, v, block.scale, window, block.softcap, block.sinks)
        out[reach.row : reach.row + reach.count] = attended.transpose(0, 1)
    return out.view(len(rows), -1)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """The RMS norm of the last dimension."""
    if not norm.offset:
        return rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    wide: Any = rms_norm(x.float(), norm.weight.shape, norm.weight.float() + 1.0, norm.eps)
    return wide.to(x.dtype)  # type: ignore[no-any-return]
