"""A model goes into one real IPFS node and comes out of another, which had nothing, by bitswap; then it is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.demo import demo_model
from serve_app.engine.load import LoadOptions
from serve_app.local import LocalPipeline
from serve_app.messages.request import FinishedEvent, GenerationRequest, RequestId, Sampling, fresh_salt
from shard_tools.catalog import open_record
from shard_tools.choice import Choice
from shard_tools.cid import Cid, Codec
from shard_tools.errors import UnavailableError
from shard_tools.fetch import fetch, load_manifest, model_blocks, verify
from shard_tools.http_client import Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.block_store import BlockStore, Dag
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.gateway import CAR, Gateway
from shard_tools.store.stores import open_store
from shard_tools.trust import TrustPolicy
from tests.nodes.nodes import JsNode, fresh_swarm_key, js_ipfs_missing, js_node, kubo_core, kubo_missing
from tests.shard_tools.http_doubles import answering, ok, saying
from tests.shard_tools.test_cli import Desk
from tests.tiny_models import write_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
needs_js = pytest.mark.skipif(bool(js_ipfs_missing()), reason=js_ipfs_missing())
needs_kubo = pytest.mark.skipif(bool(kubo_missing()), reason=kubo_missing())

SIGNER = Signer.from_seed(bytes(32))


class Model:
    """A published model in a directory."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        checkpoint = write_tiny_checkpoint(folder / "ck", layers=3, hidden=128, vocab=4000)
        self.store = DirectoryStore(folder / "store")
        self.record = publish(checkpoint, self.store, DirectoryIndex(folder / "store"), "tiny", SIGNER)
        self.manifest = open_record(self.record, self.store, TrustPolicy.any_of([SIGNER.public]))
        self.cids = [*model_blocks(self.manifest, self.store.get), self.record.signature]

    def blocks(self) -> Iterator[tuple[Cid, bytes]]:
        for cid in self.cids:
            yield cid, self.store.get(cid)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JsNode, JsNode]]:
    """Two js-ipfs nodes that know each other."""
    folder = tmp_path_factory.mktemp("js")
    with js_node(folder / "a") as a, js_node(folder / "b") as b:
        b.connect(a.address)
        yield a, b


def reaching(node: JsNode, cache: Path) -> BlockStore:
    return open_store(Choice.of("tiered", cache=str(cache), ipfs=node.api, answer_s=20.0))


def push(model: Model, node: JsNode) -> None:
    from shard_tools.store.ipfs import IpfsNode

    IpfsNode(node.api).put([model.record.manifest, model.record.signature], model.blocks(), pin=True)


@needs_js
def test_a_model_pushed_to_one_node_is_fetched_from_another_by_bitswap_and_served(
    model: Model, pair: tuple[JsNode, JsNode], tmp_path: Path
) -> None:
    """Equal CIDs, equal bytes; a stage then loads from the store that the fetch filled."""
    from shard_tools.store.ipfs import IpfsNode

    a, b = pair
    push(model, a)
    for cid in (model.record.manifest, model.record.signature):
        assert IpfsNode(a.api).pinned(cid)
    there, target = reaching(b, tmp_path / "cache"), DirectoryStore(tmp_path / "target")
    found = open_record(model.record, there, TrustPolicy.any_of([SIGNER.public]))
    assert found == model.manifest == fetch(there, target, model.record.manifest)
    assert verify(target, found) == []
    assert all(target.get(cid) == block for cid, block in model.blocks() if cid != model.record.signature)
    assert len(asyncio.run(answer(target, model.manifest))) > 0


async def answer(store: BlockStore, manifest: Manifest) -> tuple[int, ...]:
    """The tokens of one answer of a pipeline of two stages."""
    pipeline = LocalPipeline(store, manifest, stages=2, options=LoadOptions("cpu", "float32", 16, 1))
    try:
        await pipeline.warm_up()
        request = GenerationRequest(
            RequestId("r"), manifest.cid, tuple(range(3, 20)), 4, Sampling(0), (), b"", fresh_salt()
        )
        events = [event async for event in pipeline.generate(request)]
        assert isinstance(events[-1], FinishedEvent) and events[-1].receipt
        return tuple(token for event in events[:-1] for token in getattr(event, "tokens", ()))
    finally:
        pipeline.close()


@needs_js
def test_a_file_of_the_model_reads_from_a_node_under_our_cid(model: Model, pair: tuple[JsNode, JsNode]) -> None:
    """Shards are plain files to anybody: safetensors bytes under the CID that we gave them."""
    push(model, pair[0])
    shard = model.manifest.shards[1]
    whole = b"".join(model.store.get(leaf.cid) for leaf in shard.leaves)
    assert pair[1].rpc("cat", str(shard.cid)).content == whole


@needs_js
def test_a_cars_blocks_are_the_shards_whoever_wrote_it(model: Model, pair: tuple[JsNode, JsNode]) -> None:
    """js-ipfs exports a shard under our CID; what a gateway would send of it is taken leaf by leaf."""
    push(model, pair[0])
    shard = model.manifest.shards[1]
    car = pair[0].rpc("dag/export", str(shard.cid)).content
    wanted = {leaf.cid: leaf.size for leaf in shard.leaves}
    with answering(saying(ok(car, kind=f"{CAR}; version=1"))) as url:
        got = dict(Gateway(url, Patience()).get_dag(Dag(shard.cid, shard.size, len(wanted), wanted)))
    assert got == {cid: model.store.get(cid) for cid in wanted}


@needs_js
def test_a_node_killed_in_the_middle_is_named_and_the_fetch_goes_on_elsewhere(model: Model, tmp_path: Path) -> None:
    target = DirectoryStore(tmp_path / "target")
    with js_node(tmp_path / "node") as node:
        push(model, node)

        def killing(label: str, done: int, total: int) -> None:
            if label.startswith("layer"):
                node.kill()

        options = {"cache": str(tmp_path / "cache"), "ipfs": node.api, "answer_s": 5.0}
        with pytest.raises(UnavailableError, match=f"IPFS node {node.api}: cannot be asked"):
            fetch(
                open_store(Choice.of("tiered", **options)), target, model.record.manifest, progress=killing, threads=1
            )
        assert 0 < len(list(target.cids())) < len(model.cids)
        mirrored = open_store(Choice.of("tiered", **options, mirrors=model.store.label.removeprefix("directory ")))
        assert fetch(mirrored, target, model.record.manifest) == model.manifest
    assert verify(target, model.manifest) == []


@needs_js
def test_a_block_that_no_node_has_is_refused_in_time(pair: tuple[JsNode, JsNode], tmp_path: Path) -> None:
    store = open_store(Choice.of("tiered", cache=str(tmp_path), ipfs=pair[0].api, answer_s=2.0))
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"IPFS node .*timed out"):
        store.get(Cid.of(Codec.RAW, b"nowhere"))
    assert time.monotonic() - began < 6


@needs_kubo
def test_kubo_takes_a_whole_model_from_another_kubo_over_a_private_swarm(model: Model, tmp_path: Path) -> None:
    """One recursive pin of the manifest: all it links comes along by bitswap, byte for byte."""
    key = fresh_swarm_key()
    with kubo_core(tmp_path / "a", key) as a, kubo_core(tmp_path / "b", key) as b:
        for cid, block in model.blocks():
            a.inject(cid, block)
        assert b.ask("connect", a.address) == "0"
        assert b.ask("pin", model.record.manifest) == "0"
        for cid, block in model.blocks():
            assert b.block(cid) == (None if cid == model.record.signature else block)


@needs_kubo
def test_a_kubo_with_another_swarm_key_is_no_part_of_the_swarm(tmp_path: Path) -> None:
    with kubo_core(tmp_path / "a", fresh_swarm_key()) as a, kubo_core(tmp_path / "b", fresh_swarm_key()) as b:
        assert b.ask("connect", a.address) != "0"


@needs_js
@needs_kubo
def test_a_model_in_kubo_is_fetched_through_js_ipfs(model: Model, tmp_path: Path) -> None:
    """Kubo gives by bitswap, js-ipfs passes on by RPC, and we hash."""
    with kubo_core(tmp_path / "kubo", "") as kubo, js_node(tmp_path / "js") as js:
        for cid, block in model.blocks():
            kubo.inject(cid, block)
        js.connect(kubo.address)
        target = DirectoryStore(tmp_path / "target")
        assert fetch(reaching(js, tmp_path / "cache"), target, model.record.manifest) == model.manifest
        assert verify(target, model.manifest) == []


@needs_js
def test_the_commands_take_a_model_from_one_node_to_another_that_knows_its_name_alone(
    model: Model, pair: tuple[JsNode, JsNode], tmp_path: Path
) -> None:
    """Pushed and named in IPNS by one node; found, fetched by bitswap and verified through the other."""
    a, b = pair
    desk = Desk(tmp_path)
    pushed = desk.run("ipfs", "push", "tiny", "--api", a.api, "--ipns", "self", "--store", model.root / "store")
    assert pushed.exit_code == 0, pushed.output
    ipns, trust = pushed.stdout.split("--index ")[1].strip(), key_text(SIGNER.public)
    fetched = desk.run("fetch", "tiny", "--ipfs", b.api, "--index", ipns, "--trust", trust)
    assert fetched.exit_code == 0 and str(model.manifest.cid) in fetched.stdout, fetched.output
    assert desk.run("verify", "tiny", "--trust", trust).exit_code == 0
    assert "Known: tiny" in desk.run("fetch", "tin", "--ipfs", b.api, "--index", ipns, "--trust", trust).stderr
    assert "has no key 'x'" in desk.run("ipfs", "push", "tiny", "--api", a.api, "--ipns", "x").stderr


@needs_js
@needs_kubo
@pytest.mark.timeout(600)
def test_smollm2_goes_from_node_to_node_by_name_and_answers(
    pair: tuple[JsNode, JsNode], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Published as a person would, pushed to a node, found by its name in IPNS through another, fetched by bitswap; and
    it speaks. The same blocks go from a Kubo core to another that is asked for the manifest alone.
    """
    folder = tmp_path_factory.mktemp("smollm2")
    here, there = Desk(folder / "here"), Desk(folder / "there")
    published = here.run("publish", demo_model(), "--name", "smollm2", "--dtype", "bfloat16")
    assert published.exit_code == 0, published.output
    a, b = pair
    pushed = here.run("ipfs", "push", "smollm2", "--api", a.api, "--ipns", "self")
    assert pushed.exit_code == 0, pushed.output
    ipns, trust = pushed.stdout.split("--index ")[1].strip(), ("--trust", here.key.with_suffix(".pub"))
    # A node may know the name's record before this one for a while: IPNS promises no more.
    until = time.monotonic() + 60
    while (fetched := there.run("fetch", "smollm2", "--ipfs", b.api, "--index", ipns, *trust)).exit_code:
        assert "is not in IPNS name" in fetched.output and time.monotonic() < until, fetched.output
        time.sleep(1)
    store, origin = DirectoryStore(there.store), DirectoryStore(here.store)
    manifest = load_manifest(store, DirectoryIndex(there.store).resolve("smollm2").manifest)
    assert str(manifest.cid) in published.stdout and verify(store, manifest) == []
    key = fresh_swarm_key()
    cids = list(model_blocks(manifest, origin.get))
    with kubo_core(folder / "ka", key) as ka, kubo_core(folder / "kb", key) as kb:
        for cid in cids:
            ka.inject(cid, origin.get(cid))
        assert kb.ask("connect", ka.address) == "0" == kb.ask("pin", manifest.cid)
        assert all(kb.block(cid) == origin.get(cid) for cid in cids)
    assert asyncio.run(answer(store, manifest))


@needs_js
def test_a_node_that_falls_away_is_made_up_for_by_another(model: Model, tmp_path: Path) -> None:
    """The others fetch the model from those that are left; where too few are left, that is an error."""
    desk = Desk(tmp_path)
    with js_node(tmp_path / "a") as a, js_node(tmp_path / "b") as b, js_node(tmp_path / "c") as c:
        for node in (b, c):
            node.connect(a.address)
        c.connect(b.address)
        push(model, a)
        words = (
            "keep",
            "tiny",
            "--store",
            model.root / "store",
            "--api",
            a.api,
            "--api",
            b.api,
            "--api",
            c.api,
        )
        first = desk.run(*words)
        assert first.exit_code == 0 and f"{b.api} keeps it from now on" in first.stdout, first.output
        assert c.api not in first.stdout
        a.kill()
        second = desk.run(*words)
        assert second.exit_code == 0 and f"{b.api} keeps it\n" in second.stdout, second.output
        assert f"{c.api} keeps it from now on" in second.stdout and f"{a.api} does not: " in second.stdout
        assert "start more" in desk.run(*words, "--copies", 3).stderr
