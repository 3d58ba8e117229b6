"""A directory in front of other sources of blocks: what is asked for once is near from then on.

    get(cid):  the directory; else, alone on this machine, the sources in their order: the next one is asked when one
               says no, or has not answered in its usual time; the first right block wins, is kept, and is returned.

Laws: only blocks that hash to their names are kept or returned; a block is downloaded once by however many ask; a
source that fails or lies costs its time once and then stands behind the others for a while; a block that nobody has is
refused in bounded time, by an error that says what each source said. Resuming needs no state: what is there is there.
Knows nothing of HTTP, IPFS or peers: sources and their order are given.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, InputError, LlmdError, NotFoundError, UnavailableError
from shard_tools.store.block_store import BlockSource, Dag, DagSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.flights import Flights

Order = Callable[[Cid], Sequence[BlockSource]]

LIAR_S = 600.0  # a source that answered with wrong bytes stands behind the others for so long
LATE_S = 30.0  # one that another overtook
FAILED_S = 2.0, 300.0  # one that did not answer: at first, and at most; twice as long each time
HEDGE_S = 5.0  # a home that fetches a block from outside for us may take seconds, and asking another fetches it twice
TOTAL_S = 90.0
_THREADS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Haste:
    """hedge_s: how long a source may take before the next is asked too; four times its usual time, if that is more.

    total_s: how long a block may take altogether.
    """

    hedge_s: float = HEDGE_S
    total_s: float = TOTAL_S


class TieredStore:
    """A BlockStore whose blocks are those of `near`, and which gets others where it can."""

    def __init__(
        self,
        near: DirectoryStore,
        lock: Path,
        order: Order,
        haste: Haste | None = None,
        grew: Callable[[int], None] | None = None,
    ) -> None:
        """order: the sources to ask for a block, first to last. lock: file by which processes wait for each other.

        grew: told of the size of each block that was kept; where it is given, blocks that are read are marked as used.
        """
        self._near, self._order, self._haste, self._grew = near, order, haste or Haste(), grew
        self._flights = Flights(lock)
        self._standings: dict[str, _Standing] = {}
        self._guard = threading.Lock()
        self._keeps = True  # what it fetches; said once when it cannot, not for each of thousands of blocks
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="block source")

    @property
    def label(self) -> str:
        return self._near.label

    def put(self, codec: Codec, block: bytes) -> Cid:
        cid = self._near.put(codec, block)
        if self._grew is not None:
            self._grew(len(block))
        return cid

    def get(self, cid: Cid) -> bytes:
        """As BlockSource.get. Raises UnavailableError, a NotFoundError."""
        try:
            block = self._near.get(cid)
            if self._grew is not None:
                self._near.touch(cid)
            return block
        except (NotFoundError, CorruptBlockError):
            pass
        with self._flights.alone(cid, self._haste.total_s):
            bad: CorruptBlockError | None = None
            try:
                return self._near.get(cid)  # whoever was waited for has brought it
            except CorruptBlockError as e:
                bad = e  # torn by a loss of power, or a bad disk; a source has it whole
            except NotFoundError:
                pass
            try:
                block = self._ask(cid)
            except UnavailableError as e:
                if bad is None:
                    raise
                raise bad from e
            self._keep(cid, block, anew=bad is not None)
            return block

    def bring(self, dag: Dag, kept: Callable[[Cid], None]) -> None:
        """As DagKeeper.bring, of the source that is to be asked first, if it has streams: never past a peer.

        Who asks for one of the blocks in the meantime does not wait for the stream.
        """
        source = next(iter(self._ranked(dag.root)), None)
        if not isinstance(source, DagSource):
            return
        with self._flights.alone(dag.root, self._haste.total_s):
            missing = {cid: size for cid, size in dag.wanted.items() if not self._near.has(cid)}
            if 2 * sum(missing.values()) < dag.size:
                return  # a stream would carry more that is here already
            try:
                for cid, block in source.get_dag(replace(dag, wanted=missing)):
                    self._keep(cid, block, anew=False)
                    kept(cid)
            except LlmdError as e:
                self._failed(source, e)

    def has(self, cid: Cid) -> bool:
        return self._near.has(cid)

    def delete(self, cid: Cid) -> None:
        self._near.delete(cid)

    def cids(self) -> Iterator[Cid]:
        return self._near.cids()

    def _keep(self, cid: Cid, block: bytes, anew: bool) -> None:
        try:
            if anew:
                self._near.delete(cid)
            self._near.put(cid.codec, block)
            if self._grew is not None:
                self._grew(len(block))
            self._keeps = True
        except (InputError, OSError) as e:  # the disk is full, or may not be written: the block is right all the same
            if self._keeps:
                _log.warning("%s Blocks are fetched again each time until they can be kept: make room.", e)
            self._keeps = False

    def _ask(self, cid: Cid) -> bytes:
        """The block from the first source that gives it."""
        left = self._ranked(cid)
        running: dict[Future[bytes], tuple[BlockSource, float]] = {}
        answers = [(self._near.label, "it is not there")]
        end, next_at = time.monotonic() + self._haste.total_s, 0.0
        while left or running:
            now = time.monotonic()
            if now >= end:
                break
            if left and now >= next_at:
                source = left.pop(0)
                running[self._pool.submit(self._timed, source, cid)] = source, now
                next_at = now + max(self._haste.hedge_s, 4 * self._standing(source).usual_s)
            done, _ = wait(running, (min(next_at, end) if left else end) - now, FIRST_COMPLETED)
            for future in done:
                source, began = running.pop(future)
                error = future.exception()
                if error is None:
                    self._overtook(source, running)
                    return future.result()
                if not isinstance(error, LlmdError):
                    raise error
                self._failed(source, error)
                answers.append((source.label, f"{_said(error)} ({time.monotonic() - began:.1f} s)"))
                next_at = 0.0
        answers += [(source.label, f"no answer yet after {end - began:.1f} s") for source, began in running.values()]
        answers += [(source.label, "not asked, for lack of time") for source in left]
        hint = "Start a node that has it, or name another gateway, peer or mirror in the config."
        raise UnavailableError(f"block {cid}", tuple(answers), hint)

    def _timed(self, source: BlockSource, cid: Cid) -> bytes:
        began = time.monotonic()
        block = source.get(cid)
        self._standing(source).answered(time.monotonic() - began)
        return block

    def _ranked(self, cid: Cid) -> list[BlockSource]:
        """The sources of this block: those in good standing first, each group in the given order."""
        now = time.monotonic()
        return sorted(self._order(cid), key=lambda source: self._standing(source).behind_until > now)

    def _standing(self, source: BlockSource) -> _Standing:
        with self._guard:
            return self._standings.setdefault(source.label, _Standing())

    def _failed(self, source: BlockSource, error: LlmdError) -> None:
        standing = self._standing(source)
        if isinstance(error, CorruptBlockError):
            _log.warning("%s It is asked after all others for %.0f s.", error, LIAR_S)
            standing.send_back(LIAR_S)
        elif not isinstance(error, NotFoundError):
            standing.failures += 1
            standing.send_back(min(FAILED_S[1], FAILED_S[0] * 2 ** min(standing.failures - 1, 10)))

    def _overtook(self, winner: BlockSource, running: dict[Future[bytes], tuple[BlockSource, float]]) -> None:
        for future, (source, _) in running.items():
            future.cancel()
            if source is not winner:
                self._standing(source).send_back(LATE_S)


class _Standing:
    """What is known of one source."""

    def __init__(self) -> None:
        self.usual_s = 0.0  # of its answers, the newer the heavier
        self.behind_until = 0.0
        self.failures = 0

    def answered(self, seconds: float) -> None:
        self.usual_s = seconds if not self.usual_s else 0.8 * self.usual_s + 0.2 * seconds
        self.failures = 0

    def send_back(self, seconds: float) -> None:
        self.behind_until = max(self.behind_until, time.monotonic() + seconds)


def _said(error: LlmdError) -> str:
    return str(getattr(error, "said", "") or error)[:300]
