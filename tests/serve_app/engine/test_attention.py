"""Attention over pages equals attention over a plain dense cache, in float64, for every shape of step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from serve_app.engine.attention import KV_ATTRIBUTE, paged_attention
from serve_app.engine.kv_pages import KvPages
from serve_app.errors import ProtocolError
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan

PAGE = 4


def plan(
    spans: list[tuple[int, int, int]], pages: list[list[int]], opens: list[int], closes: tuple[int, ...] = ()
) -> StepPlan:
    """spans: (seq, start, count); pages: new ones of each span."""
    rows = [(seq, start, count, len(new), 0) for (seq, start, count), new in zip(spans, pages, strict=True)]
    opening = np.zeros(len(opens), OPEN)
    opening["seq"] = opens
    flat = [page for new in pages for page in new]
    closing = np.array([(seq, 0, 0) for seq in closes], CLOSE)
    return StepPlan(1, 0, opening, np.array(rows, SPAN), np.array(flat, "<u4"), closing, np.zeros(0, "<u8"))


def dense(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [heads, rows, dim], k and v [kv_heads, length, dim], in float64, the textbook way."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    for row in range(q.shape[1]):
        for column in range(k.shape[1]):
            last = start + row
            if column > last or (window is not None and column <= last - window):
                scores[:, row, column] = float("-inf")
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, q.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return weights @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_paged_equals_dense_over_chunks_decodes_and_mixed_batches(
    kv_heads: int, window: int | None, extra: str
) -> None:
    """Two sequences with interleaved pages, prefilled in chunks, then decoded side by side; free pages hold NaN."""
    torch.manual_seed(0)
    heads, dim = 6, 8
    cap = 5.0 if extra == "softcap" else None
    sinks = torch.randn(heads, dtype=torch.float64) if extra == "sinks" else None
    kv = KvPages(PAGE, torch.device("cpu"))
    kv.reserve(12)
    module = SimpleNamespace(layer_idx=3, sliding_window=None, **{KV_ATTRIBUTE: kv})
    poison = torch.full((12 * PAGE, kv_heads, dim), float("nan"), dtype=torch.float64)
    kv._layers[3] = (poison.clone(), poison.clone())
    known: dict[int, tuple[list[Tensor], list[Tensor]]] = {7: ([], []), 8: ([], [])}
    steps = [
        ([(7, 0, 6)], [[0, 2]], [7]),
        ([(7, 6, 1), (8, 0, 5)], [[], [1, 3]], [8]),
        ([(8, 5, 4), (7, 7, 1)], [[5], []], []),
        ([(7, 8, 1), (8, 9, 1)], [[4], []], []),
    ]
    for spans, pages, opens in steps:
        rows = sum(count for _, _, count in spans)
        q = torch.randn(1, heads, rows, dim, dtype=torch.float64)
        k, v = (torch.randn(1, kv_heads, rows, dim, dtype=torch.float64) for _ in range(2))
        with kv.step(plan(spans, pages, opens)):
            out, _ = paged_attention(module, q, k, v, None, sliding_window=window, softcap=cap, s_aux=sinks)
        row = 0
        for seq, start, count in spans:
            known[seq][0].append(k[0, :, row : row + count])
            known[seq][1].append(v[0, :, row : row + count])
            keys, values = (torch.cat(parts, 1) for parts in known[seq])
            expected = dense(q[0, :, row : row + count], keys, values, start, window, cap, sinks)
            got = out[0, row : row + count].transpose(0, 1)
            # the explicit path's softmax is float32, as the models' own is
            assert torch.allclose(expected, got, atol=1e-12 if extra != "softcap" and extra != "sinks" else 1e-6)
            row += count


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (plan([(9, 0, 1)], [[0]], []), "not open"),
        (plan([(7, 1, 1)], [[]], []), "goes on at 1, but 2 rows"),
        (plan([(7, 2, 9)], [[]], []), "too few pages"),
        (plan([(7, 2, 1)], [[99]], []), "page 99 of 12"),
        (plan([(7, 0, 1)], [[1]], [7]), "open already"),
        (plan([(7, 2, 1), (7, 2, 1)], [[], []], []), "runs one sequence twice"),
        (plan([(8, 0, 1)], [[1]], [8, 8]), "opens one sequence twice"),
    ],
)
def test_a_plan_that_does_not_continue_what_is_open_changes_nothing(broken: StepPlan, message: str) -> None:
    kv = KvPages(PAGE, torch.device("cpu"))
    kv.reserve(12)
    with kv.step(plan([(7, 0, 2)], [[0]], [7])):
        pass
    with pytest.raises(ProtocolError, match=message), kv.step(broken):
        pass
    with kv.step(plan([(7, 2, 1)], [[]], [], closes=(7,))):
        assert kv.spans[0].length == 3
    with kv.step(plan([(7, 0, 1)], [[0]], [7])):
        pass  # closed, so the number may be used again


def test_a_page_that_another_sequence_left_full_of_nan_changes_nothing() -> None:
    """Nothing of a closed sequence is seen through the pages it gave back."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    nan = torch.full_like(k, float("nan"))
    outs = []
    for before in (None, nan):
        kv = KvPages(PAGE, torch.device("cpu"))
        kv.reserve(2)
        module = SimpleNamespace(layer_idx=0, sliding_window=None, **{KV_ATTRIBUTE: kv})
        if before is not None:
            with kv.step(plan([(1, 0, 5)], [[0, 1]], [1], closes=(1,))):
                paged_attention(module, q, before, before, None)
        with kv.step(plan([(2, 0, 5)], [[1, 0]], [2])):
            outs.append(paged_attention(module, q, k, v, None)[0])
    assert torch.equal(outs[0], outs[1]) and outs[1].isfinite().all()


def test_a_step_that_fails_midway_still_forgets_what_it_closes() -> None:
    """The Head has given those pages to others already."""
    kv = KvPages(PAGE, torch.device("cpu"))
    kv.reserve(2)
    with pytest.raises(ZeroDivisionError), kv.step(plan([(1, 0, 2)], [[0]], [1], closes=(1,))):
        raise ZeroDivisionError
    assert kv.spans == ()
    with kv.step(plan([(1, 0, 2)], [[0]], [1])):
        pass
