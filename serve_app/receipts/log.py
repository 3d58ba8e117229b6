"""An append-only log that cannot tell two stories: what is in it, and that it only grew, is proved in a few hashes.

The tree and both proofs are those of RFC 9162 (sections 2.1.1, 2.1.3 and 2.1.4), over the bytes of entries: CIDs of
receipts and verdicts, whatever an operator answers for. A *tree head* is the size and root, signed; two heads of one
size with different roots, or two that no proof connects, convict whoever signed them.
Laws: a proof made by `Log` is accepted by `require_included` or `require_grown`; for other entries, roots or sizes it
is not. Bytes: PROTOCOL.md. Pure: hashes are kept in memory, and where entries are stored is another's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.receipts.identity import MAX_TIME
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.signing import Envelope, PublicKey, Signer

TREE_HEAD_TYPE = "application/vnd.llmd.tree-head.v1+dag-cbor"
MAX_HEAD_BYTES = 256
MAX_ENTRIES = 1 << 48
MAX_PROOF = 2 * 48  # hashes: two paths of a tree of MAX_ENTRIES
HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class TreeHead:
    """A log as it was at some time."""

    size: int
    root: bytes
    at_ms: int

    def seal(self, log: Signer) -> Envelope:
        """The head as the log signs it."""
        value: canonical.Value = {"v": 1, "size": self.size, "root": self.root, "at_ms": self.at_ms}
        return Envelope.seal(log, TREE_HEAD_TYPE, canonical.encode(value))

    @classmethod
    def open(cls, envelope: Envelope, log: PublicKey) -> TreeHead:
        """The head, signed by this log. Raises SignatureError, FormatError."""
        payload = envelope.open(TREE_HEAD_TYPE, frozenset((log,)), "the log")
        with Fields(canonical.decode(payload, max_bytes=MAX_HEAD_BYTES), "tree head") as f:
            f.integer("v", 1, 1)
            size, root = f.integer("size", 0, MAX_ENTRIES), f.data("root", HASH_BYTES, HASH_BYTES)
            return cls(size, root, f.integer("at_ms", 0, MAX_TIME))


class Log:
    """Grows. Keeps the hash of every full subtree, 64 bytes an entry, so that a proof costs its own length."""

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = [[]]  # [k][i]: over entries [i 2^k, (i + 1) 2^k)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, entry: bytes) -> int:
        """Its index."""
        index, node = len(self), leaf_hash(entry)
        self._levels[0].append(node)
        level = 0
        while len(self._levels[level]) % 2 == 0:
            node = _inner(*self._levels[level][-2:])
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(node)
        return index

    def head(self, at_ms: int) -> TreeHead:
        """The log as it is."""
        return TreeHead(len(self), self.root(), at_ms)

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` entries; None: over all."""
        return self._range(0, len(self) if size is None else size)

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Proof that entry `index` is among the first `size`, from the leaf upwards (RFC 9162, 2.1.3.1)."""
        size = len(self) if size is None else size
        assert 0 <= index < size <= len(self)
        return tuple(self._path(index, 0, size))

    def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """Proof that the first `old` entries are a beginning of the first `size` (2.1.4.1)."""
        size = len(self) if size is None else size
        assert 0 < old <= size <= len(self)
        return tuple(self._subproof(old, 0, size, True))

    def _range(self, start: int, stop: int) -> bytes:
        if start == stop:
            return hashlib.sha256(b"").digest()
        level = (stop - start).bit_length() - 1
        if stop - start == 1 << level and start % (1 << level) == 0:
            return self._levels[level][start >> level]
        middle = start + _split(stop - start)
        return _inner(self._range(start, middle), self._range(middle, stop))

    def _path(self, index: int, start: int, stop: int) -> list[bytes]:
        if stop - start == 1:
            return []
        middle = start + _split(stop - start)
        if index < middle:
            return [*self._path(index, start, middle), self._range(middle, stop)]
        return [*self._path(index, middle, stop), self._range(start, middle)]

    def _subproof(self, old: int, start: int, stop: int, known: bool) -> list[bytes]:
        """old: counted from 0. known: whether the verifier has the root over [start, old) already."""
        if old == stop:
            return [] if known else [self._range(start, stop)]
        middle = start + _split(stop - start)
        if old <= middle:
            return [*self._subproof(old, start, middle, known), self._range(middle, stop)]
        return [*self._subproof(old, middle, stop, False), self._range(start, middle)]


def leaf_hash(entry: bytes) -> bytes:
    """32 bytes."""
    return hashlib.sha256(b"\0" + entry).digest()


def require_included(entry: bytes, index: int, head: TreeHead, proof: Sequence[bytes]) -> None:
    """Returns if the entry stands at `index` of the log that this head is of (2.1.3.2). Raises ReceiptError."""
    if not 0 <= index < head.size <= MAX_ENTRIES:
        raise ReceiptError(f"log: entry {index} of a log of {head.size}")
    _require_form(proof)
    fn, sn, node = index, head.size - 1, leaf_hash(entry)
    for other in proof:
        if sn == 0:
            raise ReceiptError("log: the proof of inclusion is too long")
        if fn & 1 or fn == sn:
            node = _inner(other, node)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            node = _inner(node, other)
        fn, sn = fn >> 1, sn >> 1
    if sn or node != head.root:
        raise ReceiptError(f"log: it is not proved that entry {index} is in the log of {head.size}")


def require_grown(old: TreeHead, new: TreeHead, proof: Sequence[bytes]) -> None:
    """Returns if the newer log begins with the older one (2.1.4.2). Raises ReceiptError."""
    if not 0 <= old.size <= new.size <= MAX_ENTRIES:
        raise ReceiptError(f"log: it shrank from {old.size} to {new.size} entries")
    _require_form(proof)
    if old.size == 0 or old.size == new.size:
        empty = hashlib.sha256(b"").digest()
        if proof or (old.root != new.root if old.size else old.root != empty):
            raise ReceiptError(f"log: two stories about its first {old.size} entries")
        return
    fn, sn = old.size - 1, new.size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    path = list(proof) if fn else [old.root, *proof]
    if not path:
        raise ReceiptError("log: the proof that it grew is empty")
    was = now = path[0]
    for other in path[1:]:
        if sn == 0:
            raise ReceiptError("log: the proof that it grew is too long")
        if fn & 1 or fn == sn:
            was, now = _inner(other, was), _inner(other, now)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            now = _inner(now, other)
        fn, sn = fn >> 1, sn >> 1
    if sn or was != old.root or now != new.root:
        raise ReceiptError(f"log: it is not proved that the log of {new.size} begins with that of {old.size}")


def _require_form(proof: Sequence[bytes]) -> None:
    if len(proof) > MAX_PROOF or any(len(node) != HASH_BYTES for node in proof):
        raise ReceiptError(f"log: a proof is at most {MAX_PROOF} hashes of {HASH_BYTES} bytes")


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below size."""
    return 1 << ((size - 1).bit_length() - 1)
