"""Every kernel equals the plain computation its docstring names. On a CPU they run in Triton's interpreter."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed: the GPU engine cannot run here")

from serve_app.engine.gpu.kernels.activation import gate  # noqa: E402
from serve_app.engine.gpu.kernels.decode_attention import ChunkSpace, decode_attention, list_chunks  # noqa: E402
from serve_app.engine.gpu.kernels.norm import rms_norm  # noqa: E402
from serve_app.engine.gpu.kernels.prefill_attention import prefill_attention, rows_per_tile  # noqa: E402
from serve_app.engine.gpu.kernels.rope import rotate_and_write  # noqa: E402
from serve_app.engine.gpu.kernels.row_hash import RowHasher  # noqa: E402
from serve_app.engine.gpu.kernels.sampler import SamplerSpace, sample  # noqa: E402
from serve_app.engine.gpu.kernels.skinny_product import skinny_product  # noqa: E402
from serve_app.engine.sampler import Draw  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
DIM, PAGE = 32, 16


def tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def close(ours: Tensor, theirs: Tensor, bound: float = 2e-3) -> None:
    """The bound is that of tf32, which a GPU may use for float32 dots; the interpreter stays far below."""
    assert torch.isfinite(ours).all()
    assert (ours - theirs).norm() / theirs.norm() < bound


class Cache:
    """Pages of some sequences, scattered, and what they hold in order."""

    def __init__(self, lengths: list[int], kv_heads: int) -> None:
        per = -(-max(lengths) // PAGE)
        ids = torch.randperm(len(lengths) * per, generator=torch.Generator().manual_seed(1)).view(len(lengths), per)
        self.table = ids.to(torch.int32).to(DEVICE)
        self.keys = tensor(len(lengths) * per, kv_heads, PAGE, DIM, seed=2)
        self.values = tensor(len(lengths) * per, kv_heads, PAGE, DIM, seed=3)
        self.lengths = lengths

    def plain(self, cache: Tensor, i: int) -> Tensor:
        """[kv_heads, length, dim] of sequence i."""
        rows = cache[self.table[i].long()].permute(1, 0, 2, 3).reshape(cache.shape[1], -1, DIM)
        return rows[:, : self.lengths[i]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [rows, heads, dim] at positions start..., k and v [kv_heads, length, dim]; float64."""
    group = q.shape[1] // k.shape[0]
    k, v = (t.double().repeat_interleave(group, 0) for t in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mine = torch.arange(start, start + len(q), device=q.device)[:, None]
    at = torch.arange(k.shape[1], device=q.device)[None]
    seen = at <= mine if window is None else (at <= mine) & (at > mine - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1).float()


OPTIONS = [(None, None, False), (40, None, False), (None, 20.0, False), (None, None, True), (23, 5.0, True)]


@pytest.mark.parametrize(("window", "softcap", "has_sinks"), OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "most"), [(4, 2, 1), (4, 2, 9), (3, 3, 100), (8, 1, 5)])
def test_decode_attention_equals_plain_attention(
    heads: int, kv_heads: int, most: int, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    """Whatever the rows are cut into: most, how many chunks there may be, decides their length."""
    cache = Cache([1, 16, 300, 700, 50], kv_heads)
    order = [3, 0, 2, 1]  # rows are not in the order of slots, and one sequence sits this step out
    q = tensor(5, heads, DIM)
    sinks = tensor(heads, seed=5) if has_sinks else None
    out = torch.full((5, heads, DIM), 7.0, device=DEVICE)
    lengths = ints([*(cache.lengths[i] for i in order), 0])
    space = replace(ChunkSpace.of(100, heads, kv_heads, DIM, DEVICE), few=most, most=most)
    space.part_out.fill_(float("nan"))
    space.part_stat.fill_(float("nan"))
    list_chunks(ints([*order, 0]), lengths, space)
    decode_attention(
        q,
        cache.keys,
        cache.values,
        cache.table,
        lengths,
        out=out,
        space=space,
        scale=DIM**-0.5,
        softcap=softcap,
        window=window,
        sinks=sinks,
    )
    assert space.meta.tolist()[2] == 0, "the next layer takes its turns from the first"
    for row, i in enumerate(order):
        k, v = cache.plain(cache.keys, i), cache.plain(cache.values, i)
        close(out[row : row + 1], attend(q[row : row + 1], k, v, cache.lengths[i] - 1, window, softcap, sinks))
    assert (out[4] == 7.0).all()


def test_chunks_cover_every_position_once() -> None:
    """As short as may be for how many there may be, in the order of rows."""
    lengths = [700, 0, 1, 256, 257, *[5] * 300, 1024]
    for few, most, length in (
        (320, 10_000, 128),
        (319, 10_000, 256),
        (319, 311, 256),
        (319, 310, 512),
        (319, 307, 512),
        (319, 306, 1024),
        (1, 1, 1024),
    ):
        space = replace(ChunkSpace.of(1000, 1, 1, DIM, DEVICE), few=few, most=most)
        slots = [1000 - row for row in range(len(lengths))]
        list_chunks(ints(slots), ints(lengths), space)
        wanted = [(row, c, slots[row], n) for row, n in enumerate(lengths) for c in range(-(-n // length))]
        assert space.meta.tolist() == [len(wanted), length, 0]
        assert [tuple(item) for item in space.items[: len(wanted)].tolist()] == wanted
        firsts = [sum(-(-n // length) for n in lengths[:row]) for row in range(len(lengths))]
        assert space.first_items[: len(lengths)].tolist() == firsts


@pytest.mark.parametrize(("window", "softcap", "has_sinks"), OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (8, 1)])
def test_prefill_attention_equals_plain_attention(
    heads: int, kv_heads: int, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    cache = Cache([70, 150, 33], kv_heads)
    spans = [(2, 0), (0, 40), (1, 149)]  # slot, first new position: whole, continued, one row
    counts = [cache.lengths[slot] - start for slot, start in spans]
    q = tensor(sum(counts), heads, DIM)
    tiles, row, per_tile = [], 0, rows_per_tile(heads, kv_heads)
    for (slot, start), count in zip(spans, counts, strict=True):
        for first in range(0, count, per_tile):
            tiles.append([slot, row + first, min(per_tile, count - first), start + first])
        row += count
    sinks = tensor(heads, seed=5) if has_sinks else None
    out = torch.full_like(q, float("nan"))
    table = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    prefill_attention(
        q,
        cache.keys,
        cache.values,
        cache.table,
        table,
        out=out,
        scale=DIM**-0.5,
        softcap=softcap,
        window=window,
        sinks=sinks,
    )
    row = 0
    for (slot, start), count in zip(spans, counts, strict=True):
        k, v = cache.plain(cache.keys, slot), cache.plain(cache.values, slot)
        close(out[row : row + count], attend(q[row : row + count], k, v, start, window, softcap, sinks))
        row += count


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm_adds_and_scales(add: bool, gemma: bool) -> None:
    x, weight = tensor(5, 48), tensor(48, seed=1)
    residual = tensor(5, 48, seed=2)
    total = x + residual if add else x
    out, kept = torch.empty_like(x), residual.clone()
    rms_norm(x, weight, 1e-6, out, kept if add else None, gemma)
    scale = 1 + weight if gemma else weight
    close(out, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * scale, 1e-5)
    close(kept, total if add else residual, 1e-6)


@pytest.mark.parametrize("rows", [3, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_the_write_into_pages(rows: int, rotary: int, normed: bool) -> None:
    heads, kv_heads, slots = 4, 2, 3
    table = torch.randperm(slots * 40, generator=torch.Generator().manual_seed(1)).view(slots, 40)
    table = table.to(torch.int32).to(DEVICE)
    qkv = tensor(rows, (heads + 2 * kv_heads) * DIM)
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE) * 3
    where = positions % slots
    where[1] = -1
    angles = torch.outer(torch.arange(640, device=DEVICE).float(), tensor(rotary // 2, seed=9).abs())
    weights = (tensor(DIM, seed=7), tensor(DIM, seed=8)) if normed else (None, None)
    q_out = torch.zeros((rows, heads, DIM), device=DEVICE)
    keys = torch.zeros((slots * 40, kv_heads, PAGE, DIM), device=DEVICE)
    values = torch.zeros_like(keys)
    rotate_and_write(qkv, q_out, keys, values, angles.cos(), angles.sin(), table, where, positions, *weights, eps=1e-6)
    q, k, v = qkv.view(rows, -1, DIM).split([heads, kv_heads, kv_heads], 1)
    if normed:
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[0]
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[1]
    cos, sin = (t[positions.long()].repeat(1, 2)[:, None] for t in (angles.cos(), angles.sin()))

    def turned(x: Tensor) -> Tensor:
        head, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat([-head[..., rotary // 2 :], head[..., : rotary // 2]], -1)
        return torch.cat([head * cos + half * sin, rest], -1)

    for row in range(rows):
        if row == 1:
            assert not q_out[row].any()
            continue
        page, cell = table[where[row], positions[row] // PAGE], positions[row] % PAGE
        close(q_out[row], turned(q)[row], 1e-5)
        close(keys[page, :, cell], turned(k)[row], 1e-5)
        close(values[page, :, cell], v[row], 1e-6)
    assert int((keys.abs().sum((1, 3)) > 0).sum()) == rows - 1, "nothing but the rows' own cells was written"


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gate_and_gated_products(kind: str) -> None:
    act = torch.nn.functional.silu if kind == "silu" else lambda t: torch.nn.functional.gelu(t, approximate="tanh")
    for rows in (1, 3, 20):
        x, weight = tensor(rows, 96), tensor(2 * 40, 96, seed=1, scale=0.1)
        both = x @ weight.T
        expected = act(both[:, :40]) * both[:, 40:]
        out = torch.full((rows, 40), float("nan"), device=DEVICE)
        gate(both, out, kind)  # type: ignore[arg-type]
        close(out, expected, 1e-5)
        out.fill_(float("nan"))
        skinny_product(x, weight, out, gated=True, activation=kind, block_k=64)  # type: ignore[arg-type]
        close(out, expected)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_skinny_product_with_bias_and_residual(rows: int) -> None:
    x, weight, bias, residual = tensor(rows, 100), tensor(50, 100, seed=1), tensor(50, seed=2), tensor(rows, 50, seed=3)
    out = torch.full((rows, 50), float("nan"), device=DEVICE)
    skinny_product(x, weight, out, block_k=64)
    close(out, x @ weight.T)
    skinny_product(x, weight, residual, bias=bias, residual=residual.clone(), block_k=64)
    close(residual, x @ weight.T + bias + tensor(rows, 50, seed=3))


def drawn(logits: Tensor, draws: list[Draw], positions: list[int]) -> list[int]:
    """By the kernels; slots in reverse order of rows."""
    n = len(draws)
    slots = list(range(n))[::-1]
    by_slot = {slot: draw for slot, draw in zip(slots, draws, strict=True)}
    ordered = [by_slot[s] for s in range(n)]
    tokens, last = ints([-7] * n), ints([-7] * n)
    key_words = np.frombuffer(b"".join(d.key for d in ordered), "<i4").reshape(n, 2)
    sample(
        logits,
        ints(slots),
        ints([p - 1 for p in positions]),
        temperature_micro=ints([d.temperature_micro for d in ordered]),
        top_k=ints([d.top_k for d in ordered]),
        top_p_micro=ints([d.top_p_micro for d in ordered]),
        keys=torch.from_numpy(key_words.copy()).to(DEVICE),
        tokens=tokens,
        last_tokens=last,
        space=SamplerSpace(n, logits.shape[1], DEVICE),
    )
    assert [int(last[s]) for s in slots] == [max(int(t), 0) for t in tokens]
    return [int(t) for t in tokens]


@pytest.mark.parametrize(
    "coarse", [pytest.param(False, marks=pytest.mark.slow, id="float32"), pytest.param(True, id="many ties")]
)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0, 0, 10**6), (10**6, 0, 10**6), (600_000, 0, 10**6), (10**6, 1, 10**6), (10**6, 7, 10**6), (10**6, 50, 900_000),
     (700_000, 0, 300_000), (1_500_000, 0, 950_000), (2_000_000, 0, 1), (1, 0, 10**6), (10**6, 10**6, 10**6)],
)  # fmt: skip
def test_the_same_token_as_the_float64_rule(temperature: int, top_k: int, top_p: int, coarse: bool) -> None:
    """Given equal logits, GPU and CPU draw alike; coarse logits tie as bfloat16's do."""
    rows, n_vocab = 3, 4500
    logits = tensor(rows, n_vocab, seed=11, scale=3.0)
    if coarse:
        logits = logits.round()
    draws = [Draw(temperature, top_k, top_p, bytes([i] * 7 + [255])) for i in range(rows)]
    positions = [1, 2**20, 4096]
    host = logits.cpu().numpy()
    expected = [d.token(host[i], positions[i]) for i, d in enumerate(draws)]
    assert drawn(logits, draws, positions) == expected


def test_logits_that_are_not_finite_are_told_apart() -> None:
    logits = tensor(3, 5000, seed=1)
    logits[1, 4999] = float("nan")
    logits[2, 7] = float("inf")
    tokens = drawn(logits, [Draw(0, 0, 10**6, bytes(8))] * 3, [1, 1, 1])
    assert tokens[0] == int(logits[0].argmax()) and tokens[1:] == [-1, -1]


@pytest.mark.parametrize("words", [1, 14, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 13, 16, 33))])
def test_row_hash_is_sha256_of_prefix_position_and_row(words: int) -> None:
    """Widths on every side of where the padding needs one more block; and rows.py's leaf."""
    n, prefix = 3, bytes(range(56))
    rows = torch.randint(-(2**31), 2**31 - 1, (n, words), dtype=torch.int32, generator=torch.Generator().manual_seed(7))
    positions = [0, 300, 2**31 - 1]
    out = torch.zeros((n, 8), dtype=torch.int32, device=DEVICE)
    RowHasher(prefix, 4 * words, DEVICE).hash(rows.to(DEVICE), ints(positions), out)
    for row, position, digest in zip(rows, positions, out.cpu(), strict=True):
        expected = hashlib.sha256(prefix + position.to_bytes(8, "little") + row.numpy().tobytes()).digest()
        assert digest.numpy().tobytes() == expected
