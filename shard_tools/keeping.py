"""What of a store is kept, and what may go: models that are named or pinned stay whole, and all else is garbage.

A pin is a small file `pins/<CID of a manifest>` beside the blocks; a name keeps its model as a pin does. What is kept
is found by walking manifests, never by asking what looks old, so a shared block stays as long as one model needs it.
While a publish or fetch fills a store nothing is removed from it: its blocks have no name yet. Those younger than a
grace period stay in any case.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError, LlmdError, NotFoundError
from shard_tools.fetch import load_manifest, model_blocks
from shard_tools.index.directory import DirectoryIndex
from shard_tools.ranges import RangeMaps
from shard_tools.store.directory import DirectoryStore, HeldBlock

GRACE_S = 3600.0  # for who fills a store by another way than our commands, which hold the lock
_log = logging.getLogger(__name__)

LOW_WATER = 0.9  # a cache over its quota is brought down to this share of it, so that not every put cleans up


@contextmanager
def filling(root: Path) -> Iterator[None]:
    """Inside, nothing is removed from the store; several may fill it at once. Raises InputError."""
    with _locked(root, fcntl.LOCK_SH):
        yield


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, and what it left."""

    removed: int
    removed_bytes: int
    kept: int
    kept_bytes: int


class Pins:
    """The pins of a store."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "pins"

    def add(self, manifest: Cid) -> None:
        """The manifest is pinned. Raises InputError."""
        if manifest.codec is not Codec.DAG_CBOR:
            raise InputError(f"{manifest} is no manifest, and models are pinned as a whole")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / str(manifest)).touch()
        except OSError as e:
            raise InputError(f"cannot pin in {self._folder}: {e.strerror}") from e

    def remove(self, manifest: Cid) -> None:
        """The manifest is not pinned. Raises NotFoundError if it was not."""
        try:
            (self._folder / str(manifest)).unlink()
        except FileNotFoundError:
            raise NotFoundError(f"a pin of {manifest}", str(self._folder), "See: llmd ls") from None

    def all(self) -> tuple[Cid, ...]:
        """Every pinned manifest, sorted."""
        out = []
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                with suppress(FormatError):  # somebody else's file
                    out.append(Cid.parse(path.name))
        return tuple(sorted(out))


class StorePins:
    """What a node's endpoint asks of the pins of its store: a PinBoard."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def lacks(self, manifest: Cid) -> str:
        """Why the store does not keep all of the model; empty if it does. Blocks are there or not: none is hashed."""
        index = DirectoryIndex(self._root)
        named = (index.resolve(name).manifest for name in index.names())
        if manifest not in Pins(self._root).all() and manifest not in named:
            return f"{manifest} is neither named nor pinned here"
        return self._missing(manifest)

    def pin(self, manifest: Cid) -> None:
        """The model is pinned. Raises NotFoundError unless all of it is here, and InputError."""
        with filling(self._root):
            missing = self._missing(manifest)
            if missing:
                raise NotFoundError(f"the whole of {manifest}", str(self._root), missing)
            Pins(self._root).add(manifest)

    def _missing(self, manifest: Cid) -> str:
        store = DirectoryStore(self._root)
        try:
            absent = [cid for cid in model_blocks(load_manifest(store, manifest), store.get) if not store.has(cid)]
        except LlmdError as e:
            return str(e)
        return f"{len(absent)} of its blocks are not here, {absent[0]} first" if absent else ""


def kept_blocks(root: Path) -> frozenset[Cid]:
    """Every block that a named or pinned model of the store needs, here or not.

    Raises FormatError if a manifest cannot be read: what it needs is then unknown, and nothing may be removed.
    """
    store, index = DirectoryStore(root), DirectoryIndex(root)
    records = [index.resolve(name) for name in index.names()]
    manifests = {*Pins(root).all(), *(record.manifest for record in records)}
    out = {record.signature for record in records}
    for cid in manifests:
        try:
            out.update(model_blocks(load_manifest(store, cid), store.get))
        except LlmdError as e:
            raise FormatError(
                f"what manifest {cid} needs is unknown, so nothing was removed: {e} "
                f"Fetch it again, or drop its name or pin."
            ) from e
    return frozenset(out)


def collect(root: Path, now_s: float, grace_s: float = GRACE_S, dry: bool = False) -> Collected:
    """The store holds what named and pinned models need, and blocks younger than grace_s; the rest is gone.

    dry: it only says what would go. Raises what kept_blocks raises, and InputError while the store is being filled.
    """
    with _locked(root, fcntl.LOCK_EX | fcntl.LOCK_NB):
        store, needed = DirectoryStore(root), kept_blocks(root)
        garbage: list[HeldBlock] = []
        left: list[HeldBlock] = []
        for block in store.held():
            (left if block.cid in needed or block.used_s >= now_s - grace_s else garbage).append(block)
        if not dry:
            for block in garbage:
                store.delete(block.cid)
            RangeMaps(root).forget(needed)
    return Collected(len(garbage), sum(b.size for b in garbage), len(left), sum(b.size for b in left))


class Quota:
    """Keeps a cache below a number of bytes: blocks that were not used for longest go first, but none that is kept."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max = root, max_bytes
        self._guard = threading.Lock()
        self._left: int | None = None  # bytes until the next look; None: it was never looked

    def grew(self, size: int) -> None:
        """A block of this size was put. The whole cache is looked at when it may be full, and then within its quota
        again, unless what must be kept is larger, or somebody fills it just now.
        """
        with self._guard:
            if self._left is None or self._left < size:
                self._left = self._max - self._enforce()
            self._left -= size

    def _enforce(self) -> int:
        """Returns the bytes that are left in the cache."""
        store = DirectoryStore(self._root)
        held = sorted(store.held(), key=lambda block: block.used_s)
        total = sum(block.size for block in held)
        if total <= self._max:
            return total
        try:
            with _locked(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB):
                needed = kept_blocks(self._root)
                for block in held:
                    if total <= LOW_WATER * self._max:
                        break
                    if block.cid not in needed:
                        store.delete(block.cid)
                        total -= block.size
        except LlmdError as e:
            _log.warning("the cache %s is over its quota of %d bytes: %s", self._root, self._max, e)
        return min(total, int(LOW_WATER * self._max))  # what cannot go is not looked for again at every block


@contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    try:
        lock = (root / "keeping.lock").open("w")
    except OSError as e:
        raise InputError(f"cannot lock the store {root}: {e.strerror}") from e
    with lock:
        try:
            fcntl.flock(lock, how)
        except BlockingIOError:
            raise InputError(
                f"a publish or fetch fills {root} just now; nothing was removed. Try again later."
            ) from None
        yield
