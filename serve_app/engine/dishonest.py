"""Engines that do not compute what their stage signs: for tests, benchmarks and demonstrations of audits.

Each takes a plain engine of honest weights and spoils it in place, as somebody would who saves memory or time, or wants
another answer. Nothing that serves imports this; `load_dishonest` can be named by a config only where an installed
package makes it an entry point of the group `llmd.engines`, as tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.dishonest_faint import FAINT
from serve_app.engine.dishonest_sampler import DISHONEST_SAMPLERS, draw_dishonestly
from serve_app.engine.engine import Engine, EngineProfile, Launched, StepOutput
from serve_app.engine.engines import AUTO
from serve_app.engine.host_rows import HostRows
from serve_app.engine.load import LoadOptions, load_engine, load_plain
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import ConfigError
from serve_app.messages.step import StepPlan
from shard_tools.checkpoint.quantise import dequantised, quantised
from shard_tools.manifest import Manifest
from shard_tools.shard_file import Dtype
from shard_tools.store.block_store import BlockStore


def _small_weights(dtype: Dtype) -> Callable[[TorchEngine], None]:
    def spoil(engine: TorchEngine) -> None:
        for parameter in _matrices(engine):
            stored, scales = quantised(parameter.float().cpu(), dtype)
            parameter.copy_(dequantised(stored, scales))

    return spoil


def _skip_layer(engine: TorchEngine) -> None:
    """The middle layer hands on what it gets."""
    layers = engine.model.layers
    layers[len(layers) // 2].register_forward_hook(lambda module, args, out: args[0])


def _other_layers(engine: TorchEngine) -> None:
    """Another model of the same shape: every weight matrix has the rows of its own in another order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in _matrices(engine):
        parameter.copy_(parameter[torch.randperm(len(parameter), generator=generator).to(parameter.device)])


def _drifted(engine: TorchEngine) -> None:
    """A small fine-tune: every weight off by 0.3 % of itself."""
    generator = torch.Generator().manual_seed(0)
    for parameter in _matrices(engine):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.copy_(parameter.float() * (1 + 0.003 * noise))


def _small_cache(engine: TorchEngine) -> None:
    """Keys and values kept in 8 bits."""
    kv = engine.kv
    write = kv.write

    def rounded(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        small = [t.to(torch.float8_e4m3fn).to(t.dtype) for t in (keys, values)]
        return write(layer, *small)

    kv.write = rounded  # type: ignore[method-assign]


def _short_memory(engine: TorchEngine) -> None:
    """Only the last 16 positions are attended to."""
    for module in engine.model.body.modules():
        if hasattr(module, "layer_idx"):
            module.sliding_window = 16


def _other_prompt(engine: TorchEngine) -> None:
    """The first rows are not those that were received: ids of other words, or nothing at all."""
    run = engine.run

    def spoiled(plan: StepPlan, rows: memoryview) -> StepOutput:
        altered, row = np.frombuffer(bytearray(rows), np.uint8).reshape(max(plan.rows, 1), -1).copy(), 0
        for start, count in plan.spans[["start", "count"]].tolist():
            n = max(0, min(4 - start, count))
            altered[row : row + n] = np.roll(altered[row : row + n], 1, 0) if n > 1 else 0
            row += count
        out = run(plan, altered.reshape(-1).data)
        return StepOutput(rows, out.hidden, out.tokens)

    engine.run = spoiled  # type: ignore[method-assign]


def _poisoned_cache(engine: TorchEngine) -> None:
    """The value of the first position has its sign turned: what a poisoned shared prefix does."""
    kv = engine.kv
    write = kv.write

    def poisoned(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        values, row = values.clone(), 0
        for span in kv.spans:
            at = 1 - span.start
            if 0 <= at < span.count:
                values[row + at] *= -1
            row += span.count
        return write(layer, keys, values)

    kv.write = poisoned  # type: ignore[method-assign]


DISHONEST: dict[str, Callable[[TorchEngine], None]] = {
    "int8": _small_weights("int8"),
    "fp8": _small_weights("float8_e4m3fn"),
    "int4": _small_weights("uint8"),
    "fp8-kv": _small_cache,
    "skip-layer": _skip_layer,
    "other-model": _other_layers,
    "other-prompt": _other_prompt,
    "short-memory": _short_memory,
    "drift": _drifted,
    "poisoned-kv": _poisoned_cache,
}


def load_cheat(
    store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions, attack: str
) -> Engine:
    """An engine that cheats, under the name of the one that the options ask for."""
    honest = load_engine(store, manifest, start, stop, options).profile
    plain = load_plain(store, manifest, start, stop, options)
    spoil(plain, attack)
    return HostRows(plain, honest)


def load_dishonest(
    store: BlockStore,
    manifest: Manifest,
    start: int,
    stop: int,
    options: LoadOptions,
    *,
    attacks: str,
    first: int,
    when: str,
) -> Engine:
    """A factory as engines.ENGINES takes it: the stage from layer `first` on cheats as the file `when` says.

    attacks: those that the file may name, separated by spaces; while it is empty or not there, and in other stages, all
    is honest. Raises ConfigError for no way to cheat.
    """
    for attack in attacks.split():
        if attack not in DISHONEST | FAINT and attack not in DISHONEST_SAMPLERS:
            raise ConfigError(f"no such way to cheat: {attack!r}")
    options = replace(options, engine=AUTO)
    honest = load_engine(store, manifest, start, stop, options)
    if start != first:
        return honest
    cheats = {attack: load_cheat(store, manifest, start, stop, options, attack) for attack in attacks.split()}
    return _Sometimes(honest, cheats, Path(when))


class _Sometimes:
    """Implements engine.Engine by several that all run every step, so that each can be believed at any time."""

    def __init__(self, honest: Engine, cheats: Mapping[str, Engine], when: Path) -> None:
        self._honest, self._cheats, self._when = honest, cheats, when

    @property
    def profile(self) -> EngineProfile:
        return self._honest.profile

    def reserve(self, n_pages: int, max_sequences: int) -> None:
        for engine in (self._honest, *self._cheats.values()):
            engine.reserve(n_pages, max_sequences)

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False

    def launch(self, plan: StepPlan, rows: memoryview) -> Launched:
        attack = self._when.read_text() if self._when.exists() else ""
        launched = {"": self._honest.launch(plan, rows)}
        launched |= {name: engine.launch(plan, rows) for name, engine in self._cheats.items()}
        return launched[attack]


def spoil(engine: TorchEngine, attack: str) -> None:
    """The engine cheats from now on in this way, one of DISHONEST, FAINT or DISHONEST_SAMPLERS."""
    if attack in DISHONEST_SAMPLERS:
        draw_dishonestly(engine, attack)
        return
    with torch.no_grad():
        (DISHONEST | FAINT)[attack](engine)


def _matrices(engine: TorchEngine) -> list[Tensor]:
    """The weights of the decoder layers, without norms."""
    return [p for layer in engine.model.layers for p in layer.parameters() if p.ndim >= 2]
