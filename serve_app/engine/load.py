"""An engine from content-addressed shards: only the tensors of the units asked for, each byte verified."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from serve_app.engine.block import FindIntegers, Integers, NotFusable
from serve_app.engine.cpu.engine import CpuEngine
from serve_app.engine.cpu.stage_weights import read_weights as read_cpu_weights
from serve_app.engine.engine import ActivationDtype, DeviceName, Engine, KvDtype, StepOutput
from serve_app.engine.engines import AUTO, ENGINES
from serve_app.engine.kv_pages import KvPages
from serve_app.engine.output_head import OutputHead
from serve_app.engine.stage_model import StageModel
from serve_app.engine.torch_engine import TORCH_DTYPES, TorchEngine
from serve_app.errors import ConfigError
from serve_app.messages.step import StepPlan
from shard_tools.checkpoint.quantise import dequantised
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.errors import InputError
from shard_tools.fetch import read_file, read_tensor
from shard_tools.manifest import Manifest
from shard_tools.quantised import scale_of
from shard_tools.store.block_store import BlockStore

_log = logging.getLogger(__name__)
# What a family's code raises when it needs more than its layers and our attention give it.
_MISFITS = (NotImplementedError, AttributeError, TypeError, ValueError, IndexError, KeyError)


class LoadedEngine(Engine, Protocol):
    """An engine whose arithmetic can be looked at."""

    def run(self, plan: StepPlan, rows: memoryview) -> StepOutput:
        """The step, waited for."""

    def logits_of(self, hidden: memoryview) -> Tensor:
        """float32 [rows, vocab] of rows that left the last layer."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a stage is to compute; plain values out of the config."""

    device: DeviceName
    dtype: ActivationDtype
    page_size: int
    threads: int | None  # None: leave torch's own
    engine: Choice = AUTO  # of engines.ENGINES
    deterministic: bool = False  # a row's bits are the same whatever runs beside it, at the price of speed
    native: bool = True  # False: no step that is compiled on this machine
    kv_dtype: KvDtype = "auto"  # fp8: half the memory of keys and values, and other bits; the GPU engine alone


def load_engine(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> Engine:
    """The chosen engine of layers [start, stop), with embedding and head where they belong.

    Raises NotFoundError, CorruptBlockError naming the block, ConfigError for an engine, device or model that cannot be.
    """
    try:
        engine: Engine = ENGINES.make(options.engine, store, manifest, start, stop, options)
    except InputError as e:
        raise ConfigError(f"args.pipeline.engine: {e}") from e
    return engine


def load_fastest(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> LoadedEngine:
    """`auto`: the fastest engine that computes this model on this device."""
    loaded = _read(store, manifest, start, stop, options)
    exact = options.dtype == "float32" if options.device == "cuda" else options.deterministic
    if not exact:
        on_device = _on_gpu if options.device == "cuda" else _on_cpu
        try:
            return on_device(loaded, options)
        except ConfigError as e:
            _refuse_fp8_pages(options, e)
            _log.warning("this stage computes with plain torch ops, many times slower: %s", e)
    _refuse_fp8_pages(options)
    return loaded.plain(deterministic=options.deterministic)


def load_gpu(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> LoadedEngine:
    """`gpu`: the GPU engine. Raises ConfigError with the reason where it cannot compute this model here."""
    return _on_gpu(_read(store, manifest, start, stop, options), options)


def load_cpu(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> LoadedEngine:
    """`cpu`: the CPU engine. Raises ConfigError with the reason where it cannot compute this model here."""
    return _on_cpu(_read(store, manifest, start, stop, options), options)


def load_plain(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> TorchEngine:
    """`torch`: plain torch ops, whatever the device."""
    _refuse_fp8_pages(options)
    return _read(store, manifest, start, stop, options).plain(deterministic=options.deterministic)


def load_layers(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> TorchEngine:
    """Plain torch ops over layers [start, stop) without a head, though they may be the last: for who replays them."""
    return _read(store, manifest, start, stop, options, head=False).plain(deterministic=options.deterministic)


def load_head(store: BlockStore, manifest: Manifest, options: LoadOptions) -> OutputHead:
    """The final norm and the output layer, and no layer before them: for who draws tokens again."""
    loaded = _read(store, manifest, manifest.n_layers, manifest.n_layers, options, head=True)
    return OutputHead(
        loaded.model,
        manifest.vocab_size,
        torch.device(options.device),
        TORCH_DTYPES[options.dtype],
        hidden_size=manifest.hidden_size,
        deterministic=options.deterministic,
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Weights in their places. plain(deterministic=...): the plain engine of them; integers: of quantised ones."""

    model: StageModel
    plain: Callable[..., TorchEngine]
    integers: FindIntegers


def _read(
    store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions, head: bool | None = None
) -> _Loaded:
    """Every tensor of the range, verified. head: whether with the head; None: if the range ends where it stands.

    A range without layers is the head alone.
    """
    head = stop == manifest.n_layers if head is None else head
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("pipeline.device is cuda, but this process sees no GPU: set pipeline.device to cpu or auto")
    device = torch.device(options.device)
    units = manifest.units_of(start, stop) if start < stop else manifest.units[-1:]
    units = tuple(unit for unit in units if head or unit.kind != "head")
    places = {ref.name: manifest.tensor(ref) for unit in units for ref in unit.tensors}
    integers_once: dict[str, Integers] = {}
    read_once: dict[str, Tensor] = {}  # a tied head names the embedding's tensor a second time

    def stored(name: str) -> Tensor:
        place = places[name]
        tensor = torch.empty(place.shape, dtype=getattr(torch, place.dtype))
        read_tensor(store, place, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def integers(name: str) -> Integers | None:
        if scale_of(name) not in places:
            return None
        own = places[name].name
        if own not in integers_once:
            integers_once[own] = Integers(stored(name), stored(scale_of(name)))
        return integers_once[own]

    def read(name: str, device: torch.device) -> Tensor:
        own = places[name].name
        if own not in read_once:
            small = integers(name)
            tensor = stored(name) if small is None else dequantised(small.stored.to(device), small.scales.to(device))
            read_once[own] = tensor.to(device=device, dtype=TORCH_DTYPES[options.dtype])
        return read_once[own]

    scales = {scale_of(name) for name in places}
    kv = KvPages(options.page_size, device)
    model = StageModel(
        read_config(store, manifest),
        start=start,
        stop=stop,
        head=head,
        names=[name for name in places if name not in scales],
        read=read,
        kv=kv,
        device=device,
        dtype=TORCH_DTYPES[options.dtype],
    )

    def plain(*, deterministic: bool) -> TorchEngine:
        try:
            engine = TorchEngine(
                model,
                kv,
                embeds=start == 0,
                head=head,
                hidden_size=manifest.hidden_size,
                vocab_size=manifest.vocab_size,
                device=device,
                dtype=options.dtype,
                deterministic=deterministic,
            )
        except _MISFITS as e:  # it has run its first row
            raise ConfigError(
                f"layers [{start}, {stop}) of a {manifest.model_type} cannot run as a stage of their own: its code "
                f"failed on the first row ({type(e).__name__}: {e}). Serve it with fewer stages, or another model."
            ) from e
        if kv.n_layers != stop - start:  # else it would answer, and not know what it has read before
            raise ConfigError(
                f"{kv.n_layers} of {stop - start} layers of a {manifest.model_type} keep keys and values by "
                f"transformers' attention interface; the others cannot be served"
            )
        return engine

    return _Loaded(model, plain, integers)


def _refuse_fp8_pages(options: LoadOptions, cause: Exception | None = None) -> None:
    """For engines that know none. Raises ConfigError if they are asked for."""
    if options.kv_dtype != "auto":
        why = cause or "it does not run here, or not in this dtype"
        raise ConfigError(f"pipeline.kv_dtype {options.kv_dtype} is of the GPU engine alone: {why}") from cause


def _on_cpu(loaded: _Loaded, options: LoadOptions) -> LoadedEngine:
    """The CPU engine on the same weights. Raises ConfigError saying why it cannot be."""
    if options.device != "cpu" or options.deterministic:
        raise ConfigError("the CPU engine needs pipeline.device cpu and knows no pipeline.deterministic: use torch")
    _refuse_fp8_pages(options)
    threads = options.threads or torch.get_num_threads()
    try:
        plain = loaded.plain(deterministic=False)
        weights = read_cpu_weights(plain, options.page_size, loaded.integers, native=options.native)
    except NotFusable as e:
        raise ConfigError(f"the CPU engine does not compute this model: {e}") from e
    return CpuEngine(plain, weights, options.page_size, threads)


def _on_gpu(loaded: _Loaded, options: LoadOptions) -> LoadedEngine:
    """The GPU engine on the same weights. Raises ConfigError saying why it cannot be."""
    try:
        import triton

        from serve_app.engine.gpu.engine import GpuEngine
        from serve_app.engine.gpu.stage_weights import read_weights
    except ImportError as e:
        raise ConfigError(f"the GPU engine needs Triton: {e}") from e
    if options.device != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError("the GPU engine needs a GPU: set pipeline.device to cuda, or pipeline.engine to auto")
    try:
        plain = loaded.plain(deterministic=False)
        began = time.perf_counter()
        weights = read_weights(plain, options.page_size, loaded.integers, options.kv_dtype)
        engine = GpuEngine(plain, weights, options.page_size, options.deterministic, options.kv_dtype)
        engine.timings["check_s"] = time.perf_counter() - began
        return engine
    except NotFusable as e:
        raise ConfigError(f"the GPU engine does not compute this model: {e}") from e


def computes_fast_in(dtype: ActivationDtype, device: DeviceName) -> bool:
    """Whether matrix products of this dtype have instructions of their own on this host's device."""
    if device == "cuda" or dtype == "float32":
        return True
    probe = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, probe, None)  # oneDNN's own word; absent in builds without it
    return bool(supported()) if supported is not None else False


def shards_of(manifest: Manifest, start: int, stop: int) -> tuple[Cid, ...]:
    """The shard files that layers [start, stop) need, in the manifest's order."""
    needed = {ref.shard for unit in manifest.units_of(start, stop) for ref in unit.tensors}
    return tuple(shard.cid for i, shard in enumerate(manifest.shards) if i in needed)


def read_config(store: BlockStore, manifest: Manifest) -> dict[str, Any]:
    """The model's config.json. Raises ConfigError if the manifest carries none."""
    file = manifest.file("config.json")
    if file is None:
        raise ConfigError(f"the model {manifest.name} was published without a config.json; publish it again")
    config: dict[str, Any] = json.loads(read_file(store, file))
    return config
