"""A directory before other sources: what is kept, who is asked, and what happens when sources lie, stall or die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shard_tools.block_server import BlockServer
from shard_tools.choice import Choice
from shard_tools.cid import Cid, Codec
from shard_tools.cluster_key import create_key, load_key
from shard_tools.errors import CorruptBlockError, InputError, UnavailableError, UnreachableError
from shard_tools.http_client import Patience
from shard_tools.sources import open_pulling
from shard_tools.store.block_store import BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.flights import Flights
from shard_tools.store.http_source import HttpSource
from shard_tools.store.memory import MemoryStore
from shard_tools.store.peers import Peers
from shard_tools.store.stores import open_store
from shard_tools.store.tiered import Haste, TieredStore
from tests.full_disk import files_of_at_most
from tests.shard_tools.http_doubles import answering, ok, saying, silent

BLOCK = b"block" * 100
CID = Cid.of(Codec.RAW, BLOCK)
NOWHERE = Cid.of(Codec.RAW, b"nowhere")


class Counting(MemoryStore):
    """Remembers what it was asked for, and takes its time."""

    def __init__(self, *blocks: bytes, takes_s: float = 0.0, name: str = "origin") -> None:
        super().__init__()
        self.asked: Counter[Cid] = Counter()
        self.cids_put = [self.put(Codec.RAW, block) for block in blocks]
        self._takes_s, self._name = takes_s, name

    @property
    def label(self) -> str:
        return self._name

    def get(self, cid: Cid) -> bytes:
        self.asked[cid] += 1
        threading.Event().wait(self._takes_s)
        return super().get(cid)


class Lying(Counting):
    """Answers with other bytes, past its own check, as an altered server would: a CorruptBlockError at the reader."""

    def get(self, cid: Cid) -> bytes:
        self.asked[cid] += 1
        raise CorruptBlockError(cid, NOWHERE, self.label)


class Down(Counting):
    def get(self, cid: Cid) -> bytes:
        self.asked[cid] += 1
        raise UnreachableError(self.label, "refuses the connection")


def tiered(root: Path, *sources: BlockSource, hedge_s: float = 5.0, total_s: float = 20.0) -> TieredStore:
    return TieredStore(DirectoryStore(root), root / "lock", lambda _: sources, Haste(hedge_s, total_s))


def test_what_was_asked_for_once_is_near(tmp_path: Path) -> None:
    origin = Counting(BLOCK)
    store = tiered(tmp_path, origin)
    assert not store.has(CID)
    assert store.get(CID) == BLOCK == store.get(CID) == DirectoryStore(tmp_path).get(CID)
    assert origin.asked == {CID: 1} and store.has(CID)


def test_a_torn_block_is_replaced_from_a_source_even_if_its_length_is_right(tmp_path: Path) -> None:
    store = tiered(tmp_path, Counting(BLOCK))
    store.get(CID)
    next((tmp_path / "blocks").rglob(str(CID))).write_bytes(b"wrong" * 100)
    assert store.get(CID) == BLOCK == DirectoryStore(tmp_path).get(CID)


def test_sources_that_fail_or_lie_are_passed_over_and_then_stand_behind(tmp_path: Path) -> None:
    blocks = [bytes([i]) * 10 for i in range(5)]
    liar, down, good = Lying(name="liar"), Down(name="down"), Counting(*blocks)
    store = tiered(tmp_path, liar, down, good)
    for cid, block in zip(good.cids_put, blocks, strict=True):
        assert store.get(cid) == block
    assert liar.asked.total() == 1 == down.asked.total() and good.asked.total() == 5


def test_a_source_that_is_late_is_overtaken_and_its_late_answer_changes_nothing(tmp_path: Path) -> None:
    late, good = Counting(BLOCK, b"x", takes_s=1.0, name="late"), Counting(BLOCK, b"x")
    store = tiered(tmp_path, late, good, hedge_s=0.1)
    began = time.monotonic()
    assert store.get(CID) == BLOCK
    assert time.monotonic() - began < 0.9
    assert store.get(Cid.of(Codec.RAW, b"x")) == b"x"
    assert late.asked == {CID: 1}


def test_a_block_that_nobody_has_is_refused_in_time_saying_what_each_source_said(tmp_path: Path) -> None:
    """Every kind of no: not there, unreachable, wrong bytes, silence."""
    with answering(silent) as stalling, answering(saying(ok(b"wrong"))) as lying:
        patience = Patience(answer_s=0.5)
        gateways = [HttpSource(url, "gateway", patience) for url in (stalling, lying, "http://127.0.0.1:1")]
        store = tiered(tmp_path, *gateways, Counting(name="mirror"), hedge_s=0.1, total_s=5)
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            store.get(NOWHERE)
        assert time.monotonic() - began < 3
    said = dict(caught.value.answers)
    assert said[f"directory {tmp_path}"] == "it is not there"
    assert "did not answer within 0.5 s" in said[f"gateway {stalling}"]
    assert "altered" in said[f"gateway {lying}"]
    assert "refused" in said["gateway http://127.0.0.1:1"]
    assert "is not in mirror" in said["mirror"]
    assert all(label in str(caught.value) for label in said) and str(NOWHERE) in str(caught.value)
    assert list(store.cids()) == []


def test_the_time_of_a_block_is_bounded_whatever_its_sources_do(tmp_path: Path) -> None:
    slow = [Counting(BLOCK, takes_s=2.0, name=f"slow {i}") for i in range(3)]
    store = tiered(tmp_path, *slow, hedge_s=0.2, total_s=0.3)
    with pytest.raises(UnavailableError, match=r"slow 0: no answer yet after 0\.3 s.*slow 2: not asked"):
        store.get(CID)


def test_threads_that_want_one_block_download_it_once(tmp_path: Path) -> None:
    origin = Counting(BLOCK, takes_s=0.1)
    stores = [tiered(tmp_path, origin), tiered(tmp_path, origin)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda i: stores[i % 2].get(CID), range(8))) == {BLOCK}
    assert origin.asked == {CID: 1}


def _get_all(root: Path, url: str, cids: list[Cid]) -> None:
    store = tiered(root, HttpSource(url, "gateway", Patience()))
    for cid in cids:
        store.get(cid)


@contextmanager
def serving(root: Path, pull: BlockSource, secret: bytes | None = None) -> Iterator[str]:
    server = BlockServer(DirectoryStore(root), "127.0.0.1", 0, secret, pull)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.close()


def test_processes_that_want_one_model_download_each_block_once(tmp_path: Path) -> None:
    origin = Counting(*(os.urandom(1000) for _ in range(40)), takes_s=0.01)
    context = multiprocessing.get_context("spawn")
    with serving(tmp_path / "served", origin) as url:
        asking = [context.Process(target=_get_all, args=(tmp_path / "c", url, origin.cids_put)) for _ in range(2)]
        for process in asking:
            process.start()
        for process in asking:
            process.join(60)
    assert [process.exitcode for process in asking] == [0, 0]
    assert set(origin.asked.values()) == {1} and len(origin.asked) == 40


def _hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with Flights(path).alone(CID, 1):
        ready.set()
        threading.Event().wait(60)


def test_a_lock_held_by_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", ready))
    holder.start()
    assert ready.wait(30) and holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    began = time.monotonic()
    with Flights(tmp_path / "lock").alone(CID, 10):
        assert time.monotonic() - began < 1


def test_who_holds_a_lock_for_too_long_is_not_waited_for(tmp_path: Path) -> None:
    flights = Flights(tmp_path / "lock")
    with flights.alone(CID, 1), flights.alone(NOWHERE, 1):
        began = time.monotonic()
        with flights.alone(CID, 0.1):
            assert 0.1 <= time.monotonic() - began < 1


def test_on_a_full_disk_blocks_are_given_though_not_kept(tmp_path: Path) -> None:
    store = tiered(tmp_path, Counting(BLOCK))
    with files_of_at_most(100):
        assert store.get(CID) == BLOCK
        with pytest.raises(InputError, match="cannot write block"):
            store.put(Codec.RAW, BLOCK)
    assert list(store.cids()) == [] and list((tmp_path / "tmp").iterdir()) == []
    assert store.get(CID) == BLOCK and store.has(CID)


def test_a_node_killed_in_the_middle_of_a_transfer_is_replaced_by_another(tmp_path: Path) -> None:
    blocks = [os.urandom(100_000) for _ in range(60)]
    first, second = DirectoryStore(tmp_path / "1"), DirectoryStore(tmp_path / "2")
    cids = [first.put(Codec.RAW, block) and second.put(Codec.RAW, block) for block in blocks]
    servers = [BlockServer(store, "127.0.0.1", 0, None) for store in (first, second)]
    sources = [HttpSource(f"http://127.0.0.1:{server.port}", "peer", Patience()) for server in servers]
    store = tiered(tmp_path / "c", *sources)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = []
            for i, block in enumerate(pool.map(store.get, cids)):
                got.append(block)
                if i == 10:
                    servers[0].close()
        assert got == blocks
    finally:
        servers[1].close()


def cluster_store(root: Path, urls: list[str], key: Path) -> TieredStore:
    store = open_store(Choice.of("peers", cache=str(root), addresses=" ".join(urls), cluster_key=str(key)))
    assert isinstance(store, TieredStore)
    return store


def test_nodes_that_join_at_once_bring_each_block_into_the_cluster_once(tmp_path: Path) -> None:
    """Four nodes that have nothing: outside is asked once for a block, though all want all of them at once."""
    origin = Counting(*(os.urandom(5000) for _ in range(40)), takes_s=0.002)
    key = tmp_path / "cluster.key"
    create_key(key)
    secret = load_key(key)
    urls: list[str] = []
    servers = []
    for i in range(4):
        near, late = DirectoryStore(tmp_path / str(i)), _Late()
        servers.append((BlockServer(near, "127.0.0.1", 0, secret, late), near, late))
        urls.append(f"http://127.0.0.1:{servers[-1][0].port}")
    peers = Peers(urls, secret, Patience())
    for i, (_, near, late) in enumerate(servers):
        late.source = open_pulling(near, tmp_path / str(i), peers, lambda _: (origin,))
    try:
        stores = [cluster_store(tmp_path / str(i), urls, key) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda store: [store.get(cid) for cid in origin.cids_put], stores):
                assert got == [origin.blocks[cid] for cid in origin.cids_put]
        assert set(origin.asked.values()) == {1} and len(origin.asked) == 40
    finally:
        for server, _, _ in servers:
            server.close()


class _Late:
    """A source that is known once all nodes have their addresses."""

    source: BlockSource
    label = "late"

    def get(self, cid: Cid) -> bytes:
        return self.source.get(cid)

    def has(self, cid: Cid) -> bool:
        return self.source.has(cid)


def test_a_node_that_leaves_moves_the_homes_of_its_own_blocks_alone() -> None:
    urls = [f"http://10.0.0.{i}:1" for i in range(8)]
    all_, without = Peers(urls, bytes(32), Patience()), Peers(urls[1:], bytes(32), Patience())
    homes: Counter[str] = Counter()
    for i in range(800):
        cid = Cid.of(Codec.RAW, bytes([i % 256, i // 256]))
        before, after = all_.order(cid)[0].label, without.order(cid)[0].label
        homes[before] += 1
        assert after == before or before == f"peer {urls[0]}"
        assert len({source.label for source in all_.order(cid)}) == 8
    assert len(homes) == 8 and min(homes.values()) > 60


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice.of("tiered", cache="/tmp/x"), "at least one"),
        (Choice.of("tiered", cache="x", gateways="http://x"), "relative"),
        (Choice.of("gateway", cache="/tmp/x", urls="x.org"), "is no address"),
        (Choice.of("gateway", cache="/tmp/x", gateways="x"), "no option"),
        (Choice.of("peers", cache="/tmp/x", addresses="http://x:1", cluster_key="/nowhere/key"), "llmd blocks key"),
        (Choice.of("tiered", cache="/tmp/x", gateways="http://x", hedge_s=0), "is no time"),
        (Choice.of("ipfs", cache="/tmp/x", api="localhost:5001"), "no address of an IPFS node"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_work_is_refused(choice: Choice, said: str, tmp_path: Path) -> None:
    options = {key: str(tmp_path) if value == "/tmp/x" else value for key, value in choice.options}
    with pytest.raises(InputError, match=said):
        open_store(Choice.of(choice.kind, **options))


def test_a_mirror_that_is_not_mounted_is_passed_over_until_it_is(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    store = open_store(Choice.of("tiered", cache=str(tmp_path / "c"), mirrors=f"{mirror} {tmp_path / 'other'}"))
    with pytest.raises(UnavailableError, match=f"directory {mirror}"):
        store.get(CID)
    assert not mirror.exists()
    DirectoryStore(mirror).put(Codec.RAW, BLOCK)
    assert store.get(CID) == BLOCK
