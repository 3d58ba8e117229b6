"""So many nodes keep a model: for those that fell away others get it, from those that are left.

A copy is an IPFS node that pins the manifest, or a node of the cluster that pins it and holds all it links. Nodes say
so themselves; this is an operator's tool for nodes of his own, and proves nothing about a stranger's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shard_tools.cid import Cid
from shard_tools.errors import LlmdError, NotFoundError, UnreachableError
from shard_tools.http_client import Answer, HttpClient, Patience

if TYPE_CHECKING:
    from shard_tools.store.ipfs import IpfsNode  # its package is an extra

_THREADS = 8
_SAID_BYTES = 4 << 10


class Keeper(Protocol):
    """Keeps one model, or could."""

    @property
    def label(self) -> str:
        """What a person calls it."""

    def keeps(self) -> bool:
        """Whether it has all of the model and will not drop it. Raises UnreachableError."""

    def keep(self) -> None:
        """It does from now on. Raises UnreachableError, NotFoundError."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Which nodes keep a model now; made: those of them that did not before; problems: of each other, what it said."""

    kept: tuple[str, ...]
    made: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


def keep_copies(keepers: Sequence[Keeper], copies: int) -> Copies:
    """`copies` of them keep the model, if so many can: first those that do, then others in the given order.

    Nobody is told to drop it.
    """
    kept: list[str] = []
    spare: list[Keeper] = []
    problems: list[tuple[str, str]] = []
    for keeper in keepers:
        try:
            if keeper.keeps():
                kept.append(keeper.label)
            else:
                spare.append(keeper)
        except LlmdError as e:
            problems.append((keeper.label, str(e)))
    made: list[str] = []
    for keeper in spare:
        if len(kept) >= copies:
            break
        try:
            keeper.keep()
            kept.append(keeper.label)
            made.append(keeper.label)
        except LlmdError as e:
            problems.append((keeper.label, str(e)))
    return Copies(tuple(kept), tuple(made), tuple(problems))


class NodeKeeper:
    """An IPFS node as a Keeper. links: the manifest, and the signature that makes it worth something."""

    def __init__(self, node: IpfsNode, links: Sequence[Cid]) -> None:
        self._node, self._links = node, links

    @property
    def label(self) -> str:
        return self._node.label

    def keeps(self) -> bool:
        return all(self._node.pinned(cid) for cid in self._links)

    def keep(self) -> None:
        for cid in self._links:
            self._node.pin(cid)


class PeerKeeper:
    """A node of the cluster as a Keeper. It is told of each block, and gets what it lacks or holds torn from the others
    that it knows: so every request is a block's work, and a repair that is cut off goes on where it was.
    """

    def __init__(self, url: str, secret: bytes, patience: Patience, manifest: Cid, blocks: Sequence[Cid]) -> None:
        """blocks: all of the model. Raises InputError for what is no address."""
        self._label = f"peer {url}"
        self._client = HttpClient(url, self._label, patience, secret)
        self._manifest, self._blocks = manifest, tuple(dict.fromkeys(blocks))

    @property
    def label(self) -> str:
        return self._label

    def keeps(self) -> bool:
        answer = self._ask("GET", f"/pins/{self._manifest}")
        if answer.status not in (200, 404):
            raise UnreachableError(self._label, answer.problem())
        return answer.status == 200

    def keep(self) -> None:
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for _ in pool.map(lambda cid: self._told(f"/ipfs/{cid}", f"block {cid}"), self._blocks):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        self._told(f"/pins/{self._manifest}", f"the whole of {self._manifest}")

    def _told(self, target: str, what: str) -> None:
        answer = self._ask("PUT", target)
        if answer.status == 404:
            raise NotFoundError(what, self._label, answer.said)
        if answer.status != 200:
            raise UnreachableError(self._label, answer.problem())

    def _ask(self, method: str, target: str) -> Answer:
        return self._client.ask(method, target, "*/*", _SAID_BYTES)
