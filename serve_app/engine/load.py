"""An engine from content-addressed shards: only the tensors of the units asked for, each byte verified."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from serve_app.engine.block import Integers, NotFusable
from serve_app.engine.cpu.engine import CpuEngine
from serve_app.engine.cpu.stage_weights import FindIntegers
from serve_app.engine.cpu.stage_weights import read_weights as read_cpu_weights
from serve_app.engine.engine import ActivationDtype, DeviceName, Engine, StepOutput
from serve_app.engine.kv_pages import KvPages
from serve_app.engine.stage_model import StageModel
from serve_app.engine.torch_engine import TORCH_DTYPES, TorchEngine
from serve_app.errors import ConfigError
from serve_app.messages.step import StepPlan
from shard_tools.checkpoint.quantise import dequantised
from shard_tools.cid import Cid
from shard_tools.fetch import read_file, read_tensor
from shard_tools.manifest import Manifest
from shard_tools.quantised import scale_of
from shard_tools.store.block_store import BlockStore

_log = logging.getLogger(__name__)


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
    fused: bool = True  # False: plain torch ops, whatever the device
    native: bool = True  # False: no step that is compiled on this machine


def load_engine(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> LoadedEngine:
    """The engine of layers [start, stop), with embedding and head where they belong: the fastest that can compute them.

    Raises NotFoundError, CorruptBlockError naming the block, ConfigError for a device or model that cannot be.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("pipeline.device is cuda, but this process sees no GPU: set pipeline.device to cpu or auto")
    device = torch.device(options.device)
    units = manifest.units_of(start, stop)
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
            tensor = stored(name) if small is None else dequantised(small.stored, small.scales)
            read_once[own] = tensor.to(device=device, dtype=TORCH_DTYPES[options.dtype])
        return read_once[own]

    scales = {scale_of(name) for name in places}
    kv = KvPages(options.page_size, device)
    model = StageModel(
        read_config(store, manifest),
        start=start,
        stop=stop,
        head=stop == manifest.n_layers,
        names=[name for name in places if name not in scales],
        read=read,
        kv=kv,
        device=device,
        dtype=TORCH_DTYPES[options.dtype],
    )
    plain = TorchEngine(
        model,
        kv,
        embeds=start == 0,
        head=stop == manifest.n_layers,
        hidden_size=manifest.hidden_size,
        vocab_size=manifest.vocab_size,
        device=device,
        dtype=options.dtype,
    )
    if not options.fused or (options.device == "cuda" and options.dtype == "float32"):
        return plain
    try:
        return _on_gpu(plain, options) if options.device == "cuda" else _on_cpu(plain, options, integers)
    except NotFusable as e:
        _log.warning("this stage computes with plain torch ops, many times slower, because of %s", e)
        return plain


def _on_cpu(plain: TorchEngine, options: LoadOptions, integers: FindIntegers) -> LoadedEngine:
    threads = options.threads or torch.get_num_threads()
    weights = read_cpu_weights(plain, options.page_size, integers, native=options.native)
    return CpuEngine(plain, weights, options.page_size, threads)


def _on_gpu(plain: TorchEngine, options: LoadOptions) -> LoadedEngine:
    """The plain one without Triton."""
    try:
        from serve_app.engine.gpu.engine import GpuEngine
        from serve_app.engine.gpu.stage_weights import read_weights
    except ImportError as e:
        _log.warning("no Triton, so this stage computes with plain torch ops, many times slower: %s", e)
        return plain
    began = time.perf_counter()
    engine = GpuEngine(plain, read_weights(plain, options.page_size), options.page_size)
    engine.timings["check_s"] = time.perf_counter() - began
    return engine


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
