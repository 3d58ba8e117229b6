"""Checkpoint to shards: one safetensors file per unit, streamed leaf by leaf into a store.

Memory is bounded by one parameter (mapped, for safetensors; dequantised, for GGUF; put together, where a layer's
experts are stored apart: then twice its size) and a few leaves.
Law: equal checkpoints, name and dtype give equal manifests, whatever the store, machine or file layout.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from shard_tools import shard_file, unixfs
from shard_tools.checkpoint.conversion import as_loaded
from shard_tools.checkpoint.families import Architecture, Parameter, architecture
from shard_tools.checkpoint.quantise import integers_of, quantised
from shard_tools.checkpoint.source import Checkpoint, Row
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CheckpointError
from shard_tools.manifest import Dtype, File, FloatDtype, Manifest, ModelName, Shard, TensorRef, Unit, check_model_name
from shard_tools.progress import Progress, silent
from shard_tools.quantised import Scheme, scale_of, scale_shape
from shard_tools.store.block_store import BlockStore

TargetDtype = Literal["keep", "float32", "bfloat16", "float16"]

AHEAD_BYTES = 16 << 20  # of tensors begun before the first of them is finished: small ones keep all threads busy
THREADS = 4  # hashing and writing leaves; more gain nothing on one disk


def split(
    checkpoint: Checkpoint,
    store: BlockStore,
    name: str,
    dtype: TargetDtype = "keep",
    progress: Progress = silent,
    scheme: Scheme | None = None,
) -> Manifest:
    """`store` holds every block of the model, its manifest's last; nothing is signed or named.

    Raises CheckpointError before any block is written if the checkpoint is not a whole model of its configuration.
    Interrupted, it leaves whole blocks only; run again, it keeps those it finds.
    """
    check_model_name(name)
    assert sys.byteorder == "little", "shards are little-endian and are written from memory as it is"
    checkpoint = as_loaded(checkpoint)
    label = checkpoint.label
    arch = architecture(checkpoint.config, label)
    sources = arch.sources(checkpoint.table, label)
    dtypes = {name: _target(checkpoint.table[source], source, dtype, label) for name, source in sources.items()}
    owned = _owned(arch, dtypes, scheme)
    small = checkpoint.files()
    _check_tied(arch, checkpoint, sources)
    files = tuple(File(path, unixfs.put_file(data, store.put), len(data)) for path, data in sorted(small.items()))
    total = sum(shard_file.tensor_bytes(s.dtype, s.shape) for unit in owned for s in unit)
    writer = _Writer(checkpoint, store, sources, progress, total)
    try:
        shards = [writer.write(_unit_label(i, arch.n_layers), unit) for i, unit in enumerate(owned) if unit]
    finally:
        writer.close()
    manifest = Manifest(
        ModelName(name),
        arch.model_type,
        arch.n_layers,
        arch.hidden_size,
        arch.vocab_size,
        arch.context_length,
        _activation_dtype(dtypes, arch),
        checkpoint.license,
        files,
        tuple(shards),
        _units(arch, shards),
        scheme,
    )
    store.put(Codec.DAG_CBOR, manifest.encode())
    return manifest


class _Writer:
    """Turns units into shards; counts what it did."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: BlockStore,
        sources: dict[str, str],
        progress: Progress,
        total: int,
    ) -> None:
        self._checkpoint, self._store, self._sources = checkpoint, store, sources
        self._pair: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # integers and scales made last
        self._progress, self._total, self._done = progress, total, 0
        self._pool = ThreadPoolExecutor(THREADS)
        # Tensors are read outside the main thread: Ctrl-C inside torch comes out as some ValueError of torch's.
        self._reader = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def write(self, label: str, tensors: list[_Stored]) -> Shard:
        """Every block of the unit's shard is in the store."""
        rows: list[tuple[str, Dtype, tuple[int, ...], list[Cid]]] = []
        begun: deque[tuple[_Stored, list[Future[tuple[Cid, int]]]]] = deque()

        def finish() -> None:
            stored, leaves = begun.popleft()
            rows.append((stored.name, stored.dtype, stored.shape, [self._finished(label, leaf) for leaf in leaves]))

        for stored in tensors:
            begun.append((stored, self._begin(stored)))
            while sum(shard_file.tensor_bytes(s.dtype, s.shape) for s, _ in begun) > AHEAD_BYTES:
                finish()
        while begun:
            finish()
        shard = Shard.build(rows)
        head = self._store.put(Codec.RAW, shard_file.header([(n, d, s) for n, d, s, _ in rows]))
        root = unixfs.put_tree([(leaf.cid, leaf.size) for leaf in shard.leaves], self._store.put)
        assert (head, root) == (shard.header.cid, shard.cid)
        self._store.put(Codec.DAG_CBOR, shard.index())
        return shard

    def _begin(self, stored: _Stored) -> list[Future[tuple[Cid, int]]]:
        """The tensor's leaves are being hashed and written."""
        dtype = stored.dtype
        flat = self._reader.submit(lambda: self._values(stored).contiguous().view(-1)).result()
        step = unixfs.LEAF_BYTES // shard_file.ITEM_BYTES[dtype]

        def put(start: int) -> tuple[Cid, int]:
            block = _bytes(flat[start : start + step], dtype, stored.name)
            return self._store.put(Codec.RAW, block), len(block)

        return [self._pool.submit(put, start) for start in range(0, flat.numel(), step)]

    def _finished(self, label: str, leaf: Future[tuple[Cid, int]]) -> Cid:
        cid, size = leaf.result()
        self._done += size
        self._progress(label, self._done, self._total)
        return cid

    def _values(self, stored: _Stored) -> torch.Tensor:
        parameter = stored.parameter
        if stored.integers is not None and self._pair is not None and self._pair[0] == parameter.name:
            return self._pair[1][stored.is_scale]
        source = self._checkpoint.read(self._sources[parameter.name])
        if tuple(source.shape) != parameter.shape:
            raise CheckpointError(f"{self._checkpoint.label}: {parameter.name!r} was read as {list(source.shape)}")
        if stored.integers is None:
            return source
        self._pair = parameter.name, quantised(source, stored.integers)
        return self._pair[1][stored.is_scale]


def _bytes(values: torch.Tensor, dtype: Dtype, name: str) -> bytes:
    out = values.to(getattr(torch, dtype))
    if dtype == "float16" and values.dtype != torch.float16 and bool((out.isinf() & ~values.isinf()).any()):
        raise CheckpointError(
            f"tensor {name!r} holds values beyond float16's range: choose --dtype bfloat16 or float32"
        )
    return out.view(torch.uint8).numpy().tobytes()


def _target(row: Row, name: str, dtype: TargetDtype, label: str) -> FloatDtype:
    if row.dtype not in ("float64", *shard_file.FLOATS):
        raise CheckpointError(f"{label}: tensor {name!r} is of {row.dtype}; shards hold {', '.join(shard_file.FLOATS)}")
    if dtype != "keep":
        return dtype
    if row.dtype == "float64":
        raise CheckpointError(f"{label}: tensor {name!r} is of float64: choose --dtype float32")
    return row.dtype  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a shard, made of one parameter. integers: what holds the parameter, or None for its floats."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    parameter: Parameter
    integers: Dtype | None = None
    is_scale: bool = False


def _owned(arch: Architecture, dtypes: dict[str, FloatDtype], scheme: Scheme | None) -> list[list[_Stored]]:
    """What is stored in each unit's shard, in file order; a unit of tied parameters only has nothing."""
    out: list[list[_Stored]] = [[] for _ in range(arch.n_layers + 2)]
    for p in arch.parameters:
        if p.same_as is not None:
            continue
        integers = integers_of(p, arch.n_layers, scheme)
        if integers is None:
            out[p.unit].append(_Stored(p.name, dtypes[p.name], p.shape, p))
            continue
        shape = (*p.shape[:-1], p.shape[-1] // 2) if integers == "uint8" else p.shape
        scales = scale_shape(integers, shape)
        assert scales is not None
        out[p.unit].append(_Stored(p.name, integers, shape, p, integers))
        out[p.unit].append(_Stored(scale_of(p.name), "bfloat16", scales, p, integers, is_scale=True))
    for unit in out:
        unit.sort(key=lambda t: shard_file.file_order(t.name, t.dtype))
    return out


def _units(arch: Architecture, shards: list[Shard]) -> tuple[Unit, ...]:
    place = {t.name: (i, k) for i, shard in enumerate(shards) for k, t in enumerate(shard.tensors)}
    refs: list[list[TensorRef]] = [[] for _ in range(arch.n_layers + 2)]
    for parameter in arch.parameters:
        owner = parameter.same_as or parameter.name
        refs[parameter.unit].append(TensorRef(*place[owner], parameter.name))
        if scale_of(owner) in place:
            refs[parameter.unit].append(TensorRef(*place[scale_of(owner)], scale_of(parameter.name)))
    last = arch.n_layers
    layers = (Unit("layer", i, i + 1, tuple(refs[i + 1])) for i in range(last))
    return Unit("embedding", 0, 0, tuple(refs[0])), *layers, Unit("head", last, last, tuple(refs[last + 1]))


def _check_tied(arch: Architecture, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    """Raises CheckpointError if a checkpoint stores a tied tensor twice with different values."""
    spare = {p.name: p.same_as for p in arch.parameters if p.same_as and p.name in checkpoint.table}
    for name, owner in spare.items():
        if sources[owner] != name and not torch.equal(checkpoint.read(name), checkpoint.read(sources[owner])):
            raise CheckpointError(
                f"{checkpoint.label}: the configuration ties {name!r} to {owner!r}, but they hold different values. "
                f"Set tie_word_embeddings to false in config.json if both are meant."
            )


def _activation_dtype(dtypes: dict[str, FloatDtype], arch: Architecture) -> FloatDtype:
    """The dtype most weights have."""
    count: Counter[FloatDtype] = Counter()
    for parameter in arch.parameters:
        if parameter.same_as is None:
            count[dtypes[parameter.name]] += prod(parameter.shape)
    return max(sorted(count), key=lambda dtype: count[dtype])


def _unit_label(place: int, n_layers: int) -> str:
    if place == 0:
        return "embedding"
    return "head" if place > n_layers else f"layer {place - 1}"
