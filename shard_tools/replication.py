"""So many IPFS nodes keep a model: for those that fell away others fetch it, from those that are left.

A recursive pin of the manifest is a copy: the node has all that it links and keeps it. Nodes say so themselves; this is
an operator's tool for nodes of his own, and proves nothing about a stranger's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.store.ipfs import IpfsNode


@dataclass(frozen=True, slots=True)
class Copies:
    """Which nodes keep a model now; made: those of them that did not before; problems: of each other, what it said."""

    kept: tuple[str, ...]
    made: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


def keep_copies(nodes: Sequence[IpfsNode], links: Sequence[Cid], copies: int) -> Copies:
    """`copies` of the nodes pin the links, if so many can: first those that do, then others in the given order.

    links: the manifest, and the signature that makes it worth something. Never unpins.
    """
    kept: list[str] = []
    spare: list[IpfsNode] = []
    problems: list[tuple[str, str]] = []
    for node in nodes:
        try:
            if all(node.pinned(cid) for cid in links):
                kept.append(node.label)
            else:
                spare.append(node)
        except LlmdError as e:
            problems.append((node.label, str(e)))
    made: list[str] = []
    for node in spare:
        if len(kept) >= copies:
            break
        try:
            for cid in links:
                node.pin(cid)
            kept.append(node.label)
            made.append(node.label)
        except LlmdError as e:
            problems.append((node.label, str(e)))
    return Copies(tuple(kept), tuple(made), tuple(problems))
