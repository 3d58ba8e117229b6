"""Which node of a cluster is asked for which block, so that a block comes into the cluster once.

Every node ranks all nodes alike for each block, by a hash of both (rendezvous hashing), and asks the first: its home.
The home fetches what it lacks from outside and keeps it. If it is down the second takes its place. A node need not
know which of the addresses is its own.
Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from shard_tools.cid import Cid
from shard_tools.http_client import Patience
from shard_tools.store.block_store import BlockSource
from shard_tools.store.http_source import HttpSource

HOMES = 2  # nodes that may be sent outside for one block; the others give only what they hold


class Peers:
    """The nodes of a cluster, at their addresses."""

    def __init__(self, urls: Sequence[str], secret: bytes, patience: Patience) -> None:
        """Raises InputError for what is no address."""
        self._sending = {url: HttpSource(url, "peer", patience, secret) for url in urls}
        self._holding = {url: HttpSource(url, "peer", patience, secret, depth=1) for url in urls}

    def order(self, cid: Cid) -> tuple[BlockSource, ...]:
        """Whom a node that wants the block asks: its homes, who get it from outside, then the others."""
        urls = self._ranked(cid)
        return (*(self._sending[url] for url in urls[:HOMES]), *(self._holding[url] for url in urls[HOMES:]))

    def holders(self, cid: Cid) -> tuple[BlockSource, ...]:
        """Whom a home asks before it goes outside: everybody, for what they hold."""
        return tuple(self._holding[url] for url in self._ranked(cid))

    def _ranked(self, cid: Cid) -> list[str]:
        return sorted(self._sending, key=lambda url: hashlib.sha256(url.encode() + cid.digest).digest())
