"""A model out of a store as a plain Hugging Face folder: for other tools, and for what is signed over files.

    config.json, tokenizer.json, ...          the small files, byte for byte as they were published
    model-00001-of-00032.safetensors, ...     one file a shard, byte for byte the shard's
    model.safetensors.index.json              which tensor is in which file

Law: equal manifests give equal folders. Every block is hashed on its way.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from shard_tools import shard_file
from shard_tools.errors import FormatError, InputError
from shard_tools.fetch import read_file
from shard_tools.manifest import Manifest, Shard
from shard_tools.progress import Progress, silent
from shard_tools.store.block_store import BlockSource

INDEX = "model.safetensors.index.json"


def write_folder(store: BlockSource, model: Manifest, folder: Path, progress: Progress = silent) -> None:
    """`folder`, which must not exist, holds the model.

    Raises InputError, NotFoundError, CorruptBlockError; then there is no folder of that name.
    """
    if model.quantised is not None:
        raise InputError(
            f"{model.name} is quantised ({model.quantised}) in a form of this project's own: no other reads it"
        )
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    if folder.exists():
        raise InputError(f"{folder} exists; name a folder that does not")
    try:
        part.mkdir(parents=True)
        _fill(store, model, part, progress)
        part.rename(folder)
    except OSError as e:
        raise InputError(f"cannot write {folder}: {e.strerror}") from e
    finally:
        _remove(part)  # is there only if the folder is not whole


def _fill(store: BlockSource, model: Manifest, folder: Path, progress: Progress) -> None:
    total, done = sum(shard.size for shard in model.shards), 0
    places: dict[str, str] = {}
    for file in model.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_file(store, file))
    for i, shard in enumerate(model.shards):
        name = f"model-{i + 1:05d}-of-{len(model.shards):05d}.safetensors"
        places |= dict.fromkeys((tensor.name for tensor in shard.tensors), name)
        _write_shard(store, shard, folder / name)
        done += shard.size
        progress(name, done, total)
    index = {"metadata": {"total_size": sum(t.size for s in model.shards for t in s.tensors)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(store: BlockSource, shard: Shard, path: Path) -> None:
    with path.open("wb") as out:
        out.write(shard_file.header([(t.name, t.dtype, t.shape) for t in shard.tensors]))
        for tensor in shard.tensors:
            for leaf in tensor.leaves:
                block = store.get(leaf.cid)
                if len(block) != leaf.size:
                    raise FormatError(f"leaf {leaf.cid} has {len(block)} bytes, its manifest says {leaf.size}")
                out.write(block)


def _remove(part: Path) -> None:
    for path in sorted(part.rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        part.rmdir()
