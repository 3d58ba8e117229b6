"""Copies of a model on the nodes of a cluster, made anew by real endpoints on loopback, from each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_tools.block_server import BlockServer
from shard_tools.cid import Cid, Codec
from shard_tools.cluster_key import create_key, load_key
from shard_tools.errors import NotFoundError, UnreachableError
from shard_tools.fetch import fetch, load_manifest, model_blocks, verify
from shard_tools.http_client import HttpClient, Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.keeping import Pins, StorePins, collect
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.replication import Keeper, PeerKeeper, keep_copies
from shard_tools.signing import Signer
from shard_tools.sources import open_pulling
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.peers import Peers
from tests.shard_tools.test_cli import Desk, refusal
from tests.tiny_models import write_tiny_checkpoint

NOBODY = "http://127.0.0.1:1"


class Late:
    """A source that is known once all nodes have their addresses."""

    label = "cluster"

    def get(self, cid: Cid) -> bytes:
        return self.source.get(cid)

    def has(self, cid: Cid) -> bool:
        return self.source.has(cid)


class Cluster:
    """Three nodes, each with a folder and an endpoint; the first has published a model."""

    def __init__(self, root: Path) -> None:
        self.key_file = root / "cluster.key"
        create_key(self.key_file)
        self.key, self.roots = load_key(self.key_file), [root / f"node{i}" for i in range(3)]
        self.stores = [DirectoryStore(folder) for folder in self.roots]
        folder = write_tiny_checkpoint(root / "ck", layers=2)
        index = DirectoryIndex(self.roots[0])
        record = publish(folder, self.stores[0], index, "tiny", Signer.from_seed(bytes(32)))
        self.model: Manifest = load_manifest(self.stores[0], record.manifest)
        self.blocks = list(model_blocks(self.model, self.stores[0].get))
        late = [Late() for _ in self.roots]
        self.servers = [
            BlockServer(store, "127.0.0.1", 0, self.key, pull, DirectoryIndex(place), StorePins(place))
            for store, pull, place in zip(self.stores, late, self.roots, strict=True)
        ]
        self.urls = [f"http://127.0.0.1:{server.port}" for server in self.servers]
        peers = Peers(self.urls, self.key, Patience())
        for source, store, place in zip(late, self.stores, self.roots, strict=True):
            source.source = open_pulling(store, place, peers, lambda _: ())

    def keeper(self, url: str, key: bytes | None = None) -> PeerKeeper:
        return PeerKeeper(url, key or self.key, Patience(), self.model.cid, self.blocks)

    def keepers(self) -> list[Keeper]:
        return [self.keeper(url) for url in self.urls]

    def whole(self, node: int) -> bool:
        return verify(self.stores[node], self.model) == []

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_so_many_copies_are_made_and_those_that_are_there_are_counted(cluster: Cluster) -> None:
    found = keep_copies(cluster.keepers(), 2)
    assert found.kept == (f"peer {cluster.urls[0]}", f"peer {cluster.urls[1]}") and found.problems == ()
    assert found.made == (f"peer {cluster.urls[1]}",)
    assert cluster.whole(1) and not cluster.whole(2)
    assert Pins(cluster.roots[1]).all() == (cluster.model.cid,)
    assert keep_copies(cluster.keepers(), 2).made == ()


def test_a_node_that_lost_its_blocks_gets_them_from_another_when_the_first_has_fallen_away(cluster: Cluster) -> None:
    """Lost and torn ones alike; the publisher is gone, so they come from the third."""
    assert len(keep_copies(cluster.keepers(), 3).kept) == 3
    lost, torn = cluster.blocks[::2], cluster.blocks[1]
    for cid in lost:
        cluster.stores[1].delete(cid)
    path = next((cluster.roots[1] / "blocks").rglob(str(torn)))
    path.write_bytes(b"?" * path.stat().st_size)
    cluster.servers[0].close()
    assert not cluster.keeper(cluster.urls[1]).keeps()
    found = keep_copies(cluster.keepers(), 2)
    assert found.made == (f"peer {cluster.urls[1]}",) and len(found.kept) == 2
    assert [label for label, _ in found.problems] == [f"peer {cluster.urls[0]}"]
    assert cluster.whole(1)
    collect(cluster.roots[1], now_s=2e10, grace_s=0)
    assert cluster.whole(1), "what is kept for others is pinned"


def test_what_no_node_has_cannot_be_kept_and_nothing_is_pinned(cluster: Cluster) -> None:
    gone = cluster.model.shards[0].leaves[-1].cid
    cluster.stores[0].delete(gone)
    found = keep_copies(cluster.keepers(), 1)
    assert found.kept == () and len(found.problems) == 3
    assert all(str(gone) in said for _, said in found.problems)
    assert Pins(cluster.roots[1]).all() == () == Pins(cluster.roots[2]).all()
    with pytest.raises(NotFoundError, match="blocks are not here"):
        StorePins(cluster.roots[0]).pin(cluster.model.cid)


def test_only_who_has_the_key_tells_a_node_what_to_keep(cluster: Cluster, tmp_path: Path) -> None:
    stranger = cluster.keeper(cluster.urls[1], bytes(32))
    for act in (stranger.keeps, stranger.keep):
        with pytest.raises(UnreachableError, match="another cluster key"):
            act()
    public = BlockServer(cluster.stores[0], "127.0.0.1", 0, None, pins=StorePins(cluster.roots[0]))
    try:
        client = HttpClient(f"http://127.0.0.1:{public.port}", "public", Patience())
        for target in (f"/ipfs/{cluster.model.cid}", f"/pins/{cluster.model.cid}", "/names/tiny"):
            assert client.ask("PUT", target, "*/*", 100).status == 403
        assert client.ask("GET", f"/pins/{cluster.model.cid}", "*/*", 100).status == 200
        assert client.ask("GET", "/pins/../../etc/passwd", "*/*", 100).status == 400
    finally:
        public.close()


def test_what_is_no_manifest_is_not_pinned(cluster: Cluster) -> None:
    client = HttpClient(cluster.urls[0], "node", Patience(), cluster.key)
    for cid in (cluster.model.shards[0].leaves[0].cid, Cid.of(Codec.DAG_CBOR, b"x"), cluster.blocks[-2]):
        assert client.ask("PUT", f"/pins/{cid}", "*/*", 100).status == 404
    assert Pins(cluster.roots[0]).all() == ()
    assert client.ask("PUT", "/names/tiny", "*/*", 100).status == 405
    bare = BlockServer(cluster.stores[0], "127.0.0.1", 0, cluster.key)
    try:
        client = HttpClient(f"http://127.0.0.1:{bare.port}", "node", Patience(), cluster.key)
        assert client.ask("PUT", f"/pins/{cluster.model.cid}", "*/*", 100).status == 404
        assert client.ask("PUT", f"/ipfs/{cluster.model.cid}", "*/*", 100).status == 200
        assert client.ask("PUT", f"/ipfs/{Cid.of(Codec.RAW, b'x')}", "*/*", 100).status == 404
    finally:
        bare.close()


def test_the_command_says_who_keeps_a_model_and_fails_where_too_few_do(cluster: Cluster, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk")
    peers = [word for url in cluster.urls for word in ("--peer", url)]
    words = ("keep", "tiny", "--store", cluster.roots[0], "--cluster-key", cluster.key_file, *peers)
    done = desk.run(*words, "--copies", 3)
    assert done.exit_code == 0, done.output
    assert f"{cluster.urls[0]} keeps it\n" in done.stdout and done.stdout.count("from now on") == 2
    assert "4 should" in refusal(desk.run(*words, "--copies", 4, "--peer", NOBODY))
    assert "say which nodes" in refusal(desk.run("keep", "tiny", "--store", cluster.roots[0]))
    target = DirectoryStore(tmp_path / "target")
    assert fetch(cluster.stores[2], target, cluster.model.cid) == cluster.model
