"""From blocks to a model: read tensors and files, copy what is missing, check what is there.

Every block is hashed where it is read; nothing unverified reaches the caller. What a manifest implies (headers,
tree nodes, indexes) is rebuilt here instead of fetched, so a source is asked for leaves and small files only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from shard_tools import shard_file, unixfs
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, FormatError, LlmdError
from shard_tools.manifest import File, Leaf, Manifest, Shard, Tensor
from shard_tools.progress import Progress, silent
from shard_tools.store.block_store import BlockSource, BlockStore, Dag, DagKeeper

_SERIAL_LEAVES = 4  # a tensor of fewer is read before threads have started
STREAMS = 4  # shards that come at once; each stream hashes as it reads
_STREAM_LEAVES = 4  # of fewer a stream saves nothing
THREADS = 8  # enough to hide the latency of a peer; hashing releases the interpreter's lock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A block that a model needs and a store does not give. where: the part of the model, for a person."""

    cid: Cid
    where: str
    error: LlmdError


def load_manifest(store: BlockSource, cid: Cid) -> Manifest:
    """The manifest of this CID, with the indexes of all its shards. Nothing is said of who signed it.

    Raises NotFoundError, CorruptBlockError, FormatError, ManifestError.
    """
    if cid.codec is not Codec.DAG_CBOR:
        raise FormatError(f"{cid} is no manifest: its name says {cid.codec.name.lower()}, a manifest is dag_cbor")
    return Manifest.decode(store.get(cid), store.get)


def read_tensor(store: BlockSource, tensor: Tensor, into: memoryview) -> None:
    """`into` holds the tensor's bytes, each leaf verified before it was copied.

    into: writable, contiguous, exactly tensor.size bytes; on error its content is undefined and must not be used.
    Raises NotFoundError, CorruptBlockError.
    """
    target = into.cast("B")
    assert target.nbytes == tensor.size, (target.nbytes, tensor.size)

    def read(i: int) -> None:
        at = i * unixfs.LEAF_BYTES  # all leaves of a tensor but the last are full
        leaf = tensor.leaves[i]
        target[at : at + leaf.size] = _leaf(store, leaf)

    if len(tensor.leaves) < _SERIAL_LEAVES:
        for i in range(len(tensor.leaves)):
            read(i)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, range(len(tensor.leaves))):
            pass


def read_file(store: BlockSource, file: File) -> bytes:
    """The bytes of a small file, verified; never more than file.size of them."""
    return unixfs.read_file(file.cid, file.size, store.get)


def fetch(
    source: BlockSource,
    target: BlockStore,
    manifest: Cid,
    *,
    layers: tuple[int, int] | None = None,
    progress: Progress = silent,
    threads: int = THREADS,
) -> Manifest:
    """`target` holds every block of the model, or of a stage with layers [start, stop), and its small files.

    Blocks already there are hashed and kept, bad ones replaced: a fetch cut off at any byte goes on where it was.
    The manifest itself is put last: a target that lacks it was cut off.
    Raises what the source raises; blocks already copied stay.
    """
    model = load_manifest(source, manifest)
    wanted = _wanted(model, layers)
    total = sum(leaf.size for _, leaf in wanted) + sum(file.size for file in model.files)
    done = 0
    for file in model.files:
        _copy_file(source, target, file)
        done += file.size
        progress(file.path, done, total)
    before = done
    brought = _bring(source, model, wanted, lambda label, size: progress(label, before + size, total))
    done += sum(leaf.size for _, leaf in wanted if leaf.cid in brought)
    for label, size in _in_order(lambda item: _copy_leaf(source, target, brought, item), wanted, threads):
        done += size
        progress(label, done, total)
    for shard in model.shards:
        target.put(Codec.RAW, _header_bytes(shard))
        unixfs.put_tree([(leaf.cid, leaf.size) for leaf in shard.leaves], target.put)
        target.put(Codec.DAG_CBOR, shard.index())
    target.put(Codec.DAG_CBOR, model.encode())
    return model


def verify(store: BlockSource, model: Manifest, progress: Progress = silent, threads: int = THREADS) -> list[BadBlock]:
    """Every block of the model that the store lacks or holds altered; an empty list means: whole."""
    wanted = list(_wanted(model, None))
    total = sum(leaf.size for _, leaf in wanted) + sum(file.size for file in model.files)
    bad: list[BadBlock] = []
    done = 0
    for file in model.files:
        try:
            read_file(store, file)
        except LlmdError as e:
            bad.append(BadBlock(file.cid, f"file {file.path}", e))
        done += file.size
        progress(file.path, done, total)
    for label, leaf, error in _in_order(lambda item: (*item, _check(store, item[1])), wanted, threads):
        if error is not None:
            bad.append(BadBlock(leaf.cid, label, error))
        done += leaf.size
        progress(label, done, total)
    return bad + _bad_structure(store, model)


def model_blocks(model: Manifest, get: Callable[[Cid], bytes]) -> Iterator[Cid]:
    """The name of every block of the whole model, the manifest's last. get: for the inner nodes of small files."""
    for file in model.files:
        yield from (cid for cid, _ in unixfs.tree_nodes(file.cid, file.size, get))
    for shard in model.shards:
        yield from (leaf.cid for leaf in shard.leaves)
        yield from _tree_cids(shard)
        yield Cid.of(Codec.DAG_CBOR, shard.index())
    yield model.cid


def _wanted(model: Manifest, layers: tuple[int, int] | None) -> list[tuple[str, Leaf]]:
    """The leaves of a stage's tensors, each once, with the unit they are first needed for."""
    start, stop = layers or (0, model.n_layers)
    out: dict[Cid, tuple[str, Leaf]] = {}
    for unit in model.units_of(start, stop):
        label = f"layer {unit.start}" if unit.kind == "layer" else unit.kind
        for ref in unit.tensors:
            for leaf in model.tensor(ref).leaves:
                out.setdefault(leaf.cid, (label, leaf))
    return list(out.values())


def _bring(
    source: BlockSource, model: Manifest, wanted: Sequence[tuple[str, Leaf]], progress: Callable[[str, int], None]
) -> set[Cid]:
    """The leaves that a source has got for itself in streams, one for a shard of which most is wanted.

    progress: told the unit, and the bytes brought so far.
    """
    brought: set[Cid] = set()
    if not isinstance(source, DagKeeper):
        return brought
    labels = {leaf.cid: (label, leaf.size) for label, leaf in wanted}
    guard, stopped, done = threading.Lock(), threading.Event(), 0

    def kept(cid: Cid) -> None:
        nonlocal done
        if stopped.is_set():
            raise CancelledError  # nobody waits for the rest of a stream after Ctrl-C
        label, size = labels[cid]
        with guard:
            brought.add(cid)
            done += size
            progress(label, done)

    dags = []
    for shard in model.shards:
        sizes = {leaf.cid: leaf.size for leaf in shard.leaves if leaf.cid in labels}
        if 2 * sum(sizes.values()) >= shard.size and len(sizes) >= _STREAM_LEAVES:
            dags.append(Dag(shard.cid, shard.size, len(shard.leaves), sizes))
    pool = ThreadPoolExecutor(STREAMS)
    try:
        list(pool.map(lambda dag: source.bring(dag, kept), dags))
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    return brought


def _copy_leaf(
    source: BlockSource, target: BlockStore, brought: Collection[Cid], item: tuple[str, Leaf]
) -> tuple[str, int]:
    label, leaf = item
    hashed = leaf.cid in brought and target.has(leaf.cid)  # just now, by the store that brought it
    if not hashed and not _held(target, leaf.cid):
        _put(target, leaf.cid, _leaf(source, leaf))
    return label, 0 if leaf.cid in brought else leaf.size


def _copy_file(source: BlockSource, target: BlockStore, file: File) -> None:
    def get(cid: Cid) -> bytes:
        if _held(target, cid):
            return target.get(cid)
        block = source.get(cid)
        _put(target, cid, block)
        return block

    unixfs.read_file(file.cid, file.size, get)


def _held(target: BlockStore, cid: Cid) -> bool:
    if not target.has(cid):
        return False
    try:
        target.get(cid)
    except CorruptBlockError:
        target.delete(cid)  # torn by a loss of power, or a bad disk; the source has it whole
        return False
    return True


def _put(target: BlockStore, cid: Cid, block: bytes) -> None:
    got = target.put(cid.codec, block)
    if got != cid:
        raise CorruptBlockError(cid, got, "the source")


def _leaf(store: BlockSource, leaf: Leaf) -> bytes:
    block = store.get(leaf.cid)
    if len(block) != leaf.size:
        raise FormatError(f"{store.label}: leaf {leaf.cid} has {len(block)} bytes, its manifest says {leaf.size}")
    return block


def _check(store: BlockSource, leaf: Leaf) -> LlmdError | None:
    try:
        _leaf(store, leaf)
    except LlmdError as e:
        return e
    return None


def _bad_structure(store: BlockSource, model: Manifest) -> list[BadBlock]:
    wanted = [(model.cid, "manifest")]
    for i, shard in enumerate(model.shards):
        wanted.append((Cid.of(Codec.DAG_CBOR, shard.index()), f"index of shard {i}"))
        wanted.append((shard.header.cid, f"header of shard {i}"))
        wanted += [(cid, f"tree of shard {i}") for cid in _tree_cids(shard)]
    bad = []
    for cid, where in wanted:
        try:
            store.get(cid)
        except LlmdError as e:
            bad.append(BadBlock(cid, where, e))
    return bad


def _tree_cids(shard: Shard) -> list[Cid]:
    cids: list[Cid] = []

    def note(codec: Codec, block: bytes) -> Cid:
        cids.append(Cid.of(codec, block))
        return cids[-1]

    unixfs.put_tree([(leaf.cid, leaf.size) for leaf in shard.leaves], note)
    return cids


def _header_bytes(shard: Shard) -> bytes:
    return shard_file.header([(t.name, t.dtype, t.shape) for t in shard.tensors])


def _in_order(work: Callable[[tuple[str, Leaf]], T], items: Sequence[tuple[str, Leaf]], threads: int) -> Iterator[T]:
    """work(item) of each item, in order, done by `threads` threads; nothing is left running after an error."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
