"""Checkpoint to a name: split, sign, name, in that order, so that a name never points at what is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shard_tools.checkpoint.original import original_ranges
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import TargetDtype, split
from shard_tools.index.model_index import ModelIndex, ModelRecord
from shard_tools.manifest import check_model_name
from shard_tools.naming import sign_and_name
from shard_tools.progress import Progress, silent
from shard_tools.quantised import Scheme
from shard_tools.ranges import RangeMaps
from shard_tools.release import LIFETIME_S
from shard_tools.signing import Signer
from shard_tools.store.block_store import BlockStore


def publish(
    checkpoint: Path,
    store: BlockStore,
    index: ModelIndex,
    name: str,
    signer: Signer,
    dtype: TargetDtype = "keep",
    progress: Progress = silent,
    scheme: Scheme | None = None,
    lifetime_s: int = LIFETIME_S,
    ranges: RangeMaps | None = None,
    check: Callable[[Sequence[str]], None] | None = None,
) -> ModelRecord:
    """The model is in the store, signed, and `name` means it.

    Stopped at any moment it names nothing; run again it keeps the blocks it finds. The manifest's CID depends on
    the checkpoint, name, dtype and scheme, and not on signer, store or machine. ranges: where its range map is kept, if
    some tensors are stored as they were. check: told the files of the folder that the model is made of, before one of
    them is copied; raises if they are not to be published. Raises CheckpointError, InputError.
    """
    check_model_name(name)
    opened = open_checkpoint(checkpoint)
    if check is not None:
        check(opened.parts())
    manifest = split(opened, store, name, dtype, progress, scheme)
    found = original_ranges(opened, manifest) if ranges is not None else None
    if ranges is not None and found is not None:
        ranges.put(found)
    return sign_and_name(manifest, store, index, signer, int(time.time()), lifetime_s)
