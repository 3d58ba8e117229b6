"""Who holds a model: for each of its units, how many sources have all of it, and which unit is the weakest link."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.manifest import Manifest, Unit
from shard_tools.store.block_store import BlockSource

SAMPLE = 16  # leaves of a unit that a source is asked for, evenly spread; a layer of 70B has 1,600
_THREADS = 16


@dataclass(frozen=True, slots=True)
class UnitHolders:
    """A unit, and of each source the share of its leaves that it holds, 0 to 1; None: it did not answer."""

    unit: Unit
    shares: tuple[tuple[str, float | None], ...]

    @property
    def label(self) -> str:
        """As people call the unit."""
        return f"layer {self.unit.start}" if self.unit.kind == "layer" else self.unit.kind

    @property
    def replicas(self) -> int:
        """How many sources hold all of it (that was asked for)."""
        return sum(share == 1.0 for _, share in self.shares)


def availability(model: Manifest, sources: Sequence[BlockSource], sample: int = SAMPLE) -> tuple[UnitHolders, ...]:
    """Of each unit of the model, who holds it. sample: leaves of a unit to ask for; 0 asks for all.

    Sources say what they hold and could lie: this is for planning copies, and no proof.
    """
    out = []
    with ThreadPoolExecutor(_THREADS) as pool:
        asked = []
        for unit in model.units:
            leaves = _sample([leaf.cid for ref in unit.tensors for leaf in model.tensor(ref).leaves], sample)
            asked.append((unit, [(s, [pool.submit(_holds, s, cid) for cid in leaves]) for s in sources]))
        for unit, answers in asked:
            shares = []
            for source, futures in answers:
                said = [future.result() for future in futures]
                shares.append((source.label, None if None in said else sum(map(bool, said)) / len(said)))
            out.append(UnitHolders(unit, tuple(shares)))
    return tuple(out)


def weakest(holders: Sequence[UnitHolders]) -> UnitHolders:
    """The unit with the fewest replicas, the first of them."""
    return min(holders, key=lambda held: held.replicas)


def _holds(source: BlockSource, cid: Cid) -> bool | None:
    try:
        return source.has(cid)
    except LlmdError:
        return None


def _sample(cids: list[Cid], n: int) -> list[Cid]:
    cids = list(dict.fromkeys(cids))
    if n == 0 or len(cids) <= n:
        return cids
    return [cids[i * len(cids) // n] for i in range(n)]
