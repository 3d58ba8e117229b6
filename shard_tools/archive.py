"""A whole model in one CAR file, and back: for a memory stick, an IPFS node's `dag import`, or a web server.

The roots are the manifest and, if the model is signed, its signature. Small blocks come first, so a reader knows
after some kilobytes what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, LlmdError
from shard_tools.fetch import load_manifest, model_blocks
from shard_tools.index.model_index import ModelRecord
from shard_tools.manifest import Manifest
from shard_tools.progress import Progress, silent
from shard_tools.store.block_store import BlockSource, BlockStore
from shard_tools.store.car import read_car, write_car


@dataclass(frozen=True, slots=True)
class Imported:
    """What came out of a CAR file. record: None where it brought no signature, so nothing that could be named."""

    model: Manifest
    record: ModelRecord | None


def export_model(
    store: BlockSource, manifest: Cid, signature: Cid | None, out: BinaryIO, progress: Progress = silent
) -> int:
    """`out` holds every block of the model, each hashed on its way; returns the bytes written.

    Raises NotFoundError, CorruptBlockError; then `out` is cut short and no whole CAR.
    """
    model = load_manifest(store, manifest)
    roots = (manifest,) if signature is None else (manifest, signature)
    total = sum(shard.size for shard in model.shards) + sum(file.size for file in model.files)
    first = (*roots, *(Cid.of(Codec.DAG_CBOR, block) for block in model.index_blocks()))

    def blocks() -> Iterator[tuple[Cid, bytes]]:
        done = 0
        for cid in dict.fromkeys((*first, *model_blocks(model, store.get))):
            block = store.get(cid)
            done += len(block) if cid.codec is Codec.RAW else 0
            progress("writing", min(done, total), total)
            yield cid, block

    return write_car(out, roots, blocks())


def import_model(stream: BinaryIO, label: str, store: BlockStore) -> Imported:
    """The store holds the whole model that the CAR file's first root names.

    Every block is hashed. Blocks of a file that turns out to be cut short, or no whole model, stay: the next import
    finds them, or a garbage collection takes them, as it does what the model does not link. Raises FormatError,
    CorruptBlockError, ManifestError, and NotFoundError naming the first block that is missing.
    """
    roots, blocks = read_car(stream, label)
    read: set[Cid] = set()
    for cid, block in blocks:
        store.put(cid.codec, block)
        read.add(cid)
    try:
        model = load_manifest(store, roots[0])
        for cid in {*model_blocks(model, store.get), *roots} - read:
            store.get(cid)
    except LlmdError as e:
        raise FormatError(f"{label} holds no whole model of the manifest {roots[0]}: {e}") from e
    if len(roots) < 2:
        return Imported(model, None)
    return Imported(model, ModelRecord(roots[0], roots[1]))
