"""Attention over paged keys and values, registered with transformers under our own name.

This is the reference on every device: exact, plain torch ops, one sequence at a time. Faster kernels take
its place behind the same function when they equal it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from serve_app.engine.kv_pages import KvPages

NAME = "llmd_paged"
KV_ATTRIBUTE = "llmd_kv"  # on each attention module: the KvPages of its stage


def register() -> None:
    """After this, transformers models built with attn_implementation=NAME attend through `paged_attention`."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Each row attends to its own sequence, causally. The step's spans come from the stage's KvPages.

    query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim] -> [1, rows, heads, value dim].
    softcap: Gemma 2's logit cap; s_aux: [heads] attention sinks (gpt-oss).
    """
    kv: KvPages = getattr(module, KV_ATTRIBUTE)
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    keys, values = kv.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if kv.fresh and not kv.row_by_row and softcap is None and s_aux is None:
        k, v = (cache.index_select(0, kv.write_slots).transpose(0, 1) for cache in (keys, values))
        return _side_by_side(query[0], k, v, len(kv.spans), scaling, sliding_window).unsqueeze(0), None
    out = query.new_zeros((query.shape[2], query.shape[1], value.shape[-1]))  # zeros: of rows that pad a window
    for span in kv.spans:
        k = keys.index_select(0, span.slots).transpose(0, 1)
        v = values.index_select(0, span.slots).transpose(0, 1)
        count = 1 if kv.row_by_row else span.count
        for i in range(0, span.count, count):
            q = query[0, :, span.row + i : span.row + i + count]
            if kv.row_by_row:  # a product may look at where its operands begin, and that is the row's place in a window
                q = q.clone(memory_format=torch.contiguous_format)
            length = span.start + i + count
            attended = attend(q, k[:, :length], v[:, :length], scaling, sliding_window, softcap, s_aux)
            out[span.row + i : span.row + i + count] = attended.transpose(0, 1)
    return out.unsqueeze(0), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The last rows of one sequence over all of it, causally.

    q [heads, rows, dim], k and v [kv_heads, length, dim] -> [heads, rows, value dim].
    """
    if softcap is None and sinks is None:
        return _fused(q, k, v, scaling, window)
    return _explicit(q, k, v, scaling, window, softcap, sinks)


def _fused(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    heads, rows, dim = q.shape
    kv_heads, length = k.shape[:2]
    if rows == 1 and (window is None or length <= window):
        # One row sees everything: its query heads stand as rows of their KV head, and no mask or copy is needed.
        packed = q.reshape(kv_heads, heads // kv_heads, dim)
        return scaled_dot_product_attention(packed[None], k[None], v[None], scale=scaling)[0].reshape(heads, 1, -1)
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    if rows == length and (window is None or length <= window):
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scaling)[0]
    mask = _visible(rows, length, window, q.device)
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)[0]


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, n: int, scaling: float, window: int | None) -> Tensor:
    """n whole sequences of one length, all of which run in this step, in one product.

    q [heads, n x count, dim], k and v [kv_heads, n x count, dim] -> [n x count, heads, value dim].
    """
    groups, count = q.shape[0] // k.shape[0], q.shape[1] // n
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    q, k, v = (t.reshape(len(t), n, count, -1).transpose(0, 1) for t in (q, k, v))
    if window is None or count <= window:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=_visible(count, count, window, q.device), scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with a logit cap or sinks, which no fused torch op has; softmax in float32."""
    groups, rows, length = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q @ k.transpose(1, 2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible(rows, length, window, q.device), float("-inf")).float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., :length].to(q.dtype)
    return weights @ v


def _visible(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """[count, length] bool: which positions each of the last rows may see."""
    rows = torch.arange(length - count, length, device=device)[:, None]
    columns = torch.arange(length, device=device)[None, :]
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)
