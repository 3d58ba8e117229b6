"""Changes that hide inside the rounding of honest stages: no limit of errors can see them, equal bits alone do.

For tests and benchmarks, as dishonest.py, which applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from serve_app.engine.attention import paged_attention
from serve_app.engine.kv_pages import KvPages
from serve_app.engine.torch_engine import TorchEngine

_EAGER = "llmd_eager"


def _poisoned(engine: TorchEngine) -> None:
    """The value of the second position lies one unit in the last place higher, in every layer."""
    kv = engine.kv
    write = kv.write

    def poisoned(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.clone()
        for span in kv.spans:
            at = 1 - span.start
            if 0 <= at < span.count:
                row = values[span.row + at]
                values[span.row + at] = torch.nextafter(row, torch.full_like(row, torch.inf))
        return write(layer, keys, values)

    kv.write = poisoned  # type: ignore[method-assign]


def _turned(engine: TorchEngine) -> None:
    """Every row leaves one unit in the last place off, in one channel: what could turn a token that nearly ties."""
    layer = engine.model.layers[-1]

    def turn(module: Any, args: Any, out: Any) -> Any:
        rows = (out[0] if isinstance(out, tuple) else out).clone()
        rows[..., 0] = torch.nextafter(rows[..., 0], torch.full_like(rows[..., 0], torch.inf))
        return (rows, *out[1:]) if isinstance(out, tuple) else rows

    layer.register_forward_hook(turn)


def _other_kernel(engine: TorchEngine) -> None:
    """Attention by other operations than the profile names: the sum of a softmax that is written out."""
    AttentionInterface.register(_EAGER, _written_out)
    AttentionMaskInterface.register(_EAGER, lambda *args, **kwargs: None)
    for module in engine.model.body.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(module, "layer_idx"):
            config._attn_implementation = _EAGER


def _written_out(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    # Sinks that weigh nothing: they lead to attention.py's explicit path.
    sinks = query.new_full((query.shape[1],), -torch.inf)
    return paged_attention(module, query, key, value, mask, **{**kwargs, "s_aux": sinks})


def _in_blocks(engine: TorchEngine) -> None:
    """Rows of one sequence attend together, which is faster, under the name of an engine in which each does alone."""
    kv: KvPages = engine.kv
    window = kv.window

    @contextmanager
    def together(first: int, rows: int, size: int) -> Iterator[None]:
        with window(first, rows, size):
            kv.row_by_row = False
            yield

    kv.window = together  # type: ignore[method-assign]


def _unfixed(engine: TorchEngine) -> None:
    """The ordinary engine, several times faster, under the name of the deterministic one."""
    engine._window = None


FAINT: dict[str, Callable[[TorchEngine], None]] = {
    "faint-kv": _poisoned,
    "turned": _turned,
    "other-kernel": _other_kernel,
    "in-blocks": _in_blocks,
    "unfixed": _unfixed,
}
