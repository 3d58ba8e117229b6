"""Which tensors of a published model are, byte for byte, runs of the checkpoint's own files."""

from __future__ import annotations

from shard_tools.checkpoint.conversion import as_loaded
from shard_tools.checkpoint.families import architecture
from shard_tools.checkpoint.source import Checkpoint
from shard_tools.manifest import Manifest
from shard_tools.ranges import Place, RangeMap


def original_ranges(checkpoint: Checkpoint, model: Manifest) -> RangeMap | None:
    """The range map of a model that was made of this checkpoint; None if no tensor is stored as it was.

    Tensors that were put together, quantised or converted to another dtype are not in it.
    """
    checkpoint = as_loaded(checkpoint)
    sources = architecture(checkpoint.config, checkpoint.label).sources(checkpoint.table, checkpoint.label)
    found: list[tuple[int, int, str, int]] = []
    for i, shard in enumerate(model.shards):
        for k, tensor in enumerate(shard.tensors):
            name = sources.get(tensor.name)
            row = checkpoint.table.get(name) if name is not None else None
            if name is None or row is None or (row.dtype, row.shape) != (tensor.dtype, tensor.shape):
                continue
            place = checkpoint.place(name)
            if place is not None:
                found.append((i, k, *place))
    files = sorted({file for _, _, file, _ in found})
    places = tuple(Place(i, k, files.index(file), offset) for i, k, file, offset in found)
    return RangeMap(model.cid, tuple(files), places) if places else None
