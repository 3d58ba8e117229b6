"""A trustless gateway: single blocks, as peers give them, and a whole file's blocks in one stream, a CAR.

A stream is never trusted to be what was asked for: every block is hashed, those that were not wanted are passed over,
and it ends where the file would be larger than its manifest says. A gateway that gives no streams is asked for blocks.
Source: https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.http_client import HttpClient, Patience, Stream
from shard_tools.store.block_store import Dag
from shard_tools.store.car import MAX_HEADER_BYTES, read_blocks
from shard_tools.store.http_source import HttpSource

CAR = "application/vnd.ipld.car"
PAUSE_S = 5.0  # for the next block of a stream; single blocks are asked of the next source after as long
REFUSED_S = 600.0  # a gateway that gave no stream is not asked for one so long

_LEAF_ROOM = 256  # bytes of a stream for each leaf beside its own: name, length, and links in nodes take some 100

_log = logging.getLogger(__name__)


class Gateway:
    """A BlockSource and DagSource at one address, shared by threads."""

    def __init__(self, url: str, patience: Patience) -> None:
        """Raises InputError for what is no address."""
        self._source = HttpSource(url, "gateway", patience)
        self._client = HttpClient(url, self.label, patience)
        self._refused_until = 0.0

    @property
    def label(self) -> str:
        return self._source.label

    def get(self, cid: Cid) -> bytes:
        return self._source.get(cid)

    def has(self, cid: Cid) -> bool:
        return self._source.has(cid)

    def get_dag(self, dag: Dag) -> Iterator[tuple[Cid, bytes]]:
        if time.monotonic() < self._refused_until:
            return
        # In the address too: the specification lets it win over Accept, and caches tell answers apart by it.
        target = f"/ipfs/{dag.root}?format=car&dag-scope=entity&car-version=1&car-order=dfs&car-dups=n"
        left = dict(dag.wanted)
        with self._client.stream(target, f"{CAR}; version=1; order=dfs; dups=n", PAUSE_S) as answer:
            if answer.status != 200 or not answer.kind.startswith(CAR):
                said = f"HTTP {answer.status}" if answer.status != 200 else answer.kind[:100] or "no type"
                _log.info("%s gives no stream of %s (%s): it is asked for single blocks.", self.label, dag.root, said)
                self._refused_until = time.monotonic() + REFUSED_S
                return
            for cid, block in read_blocks(_Bounded(answer, dag, self.label), self.label):
                answer.renew()
                if left.pop(cid, None) is not None:
                    yield cid, block
                if not left:
                    return

    def close(self) -> None:
        """No connection is kept any more."""
        self._source.close()
        self._client.close()


class _Bounded:
    """A stream that may not go on for much longer than the file is."""

    def __init__(self, stream: Stream, dag: Dag, label: str) -> None:
        self._stream, self._label = stream, label
        self._left = dag.size + _LEAF_ROOM * dag.leaves + 2 * MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        part = self._stream.read(size)
        self._left -= len(part)
        if self._left < 0:
            raise FormatError(f"{self._label} sends more than the file that it was asked for")
        return part
