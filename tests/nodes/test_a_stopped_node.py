"""A real IPFS node is stopped (SIGSTOP): whoever has blocks near goes on, whoever has another source waits a moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_tools.choice import Choice
from shard_tools.errors import UnavailableError
from shard_tools.fetch import fetch, verify
from shard_tools.store.block_store import BlockStore
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.stores import open_store
from tests.nodes.nodes import JsNode, js_ipfs_missing, js_node, kubo_core
from tests.nodes.test_models_on_nodes import Model, answer, needs_js, needs_kubo, push

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ANSWER_S = 10.0  # of the node, for one block
BOUND_S = 60.0  # as long as it is stopped: seven seconds alone on two cores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def node(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsNode]:
    """It has the model."""
    reason = js_ipfs_missing()
    if reason:
        pytest.skip(reason)
    with js_node(tmp_path_factory.mktemp("js") / "node") as node:
        push(model, node)
        yield node


def reaching(node: JsNode, cache: Path, mirror: Path | None = None) -> BlockStore:
    options: dict[str, str | float] = {"cache": str(cache), "ipfs": node.api, "answer_s": ANSWER_S}
    return open_store(Choice.of("tiered", **options, **({"mirrors": str(mirror)} if mirror else {})))


def in_time(began: float) -> bool:
    return time.monotonic() - began < BOUND_S


@needs_js
def test_stages_whose_layers_are_near_are_made_and_answer_while_it_is_stopped(
    model: Model, node: JsNode, tmp_path: Path
) -> None:
    """As those that are replaced on a node which has served the model."""
    store = reaching(node, tmp_path / "cache")
    fetch(store, store, model.record.manifest)
    expected = asyncio.run(answer(store, model.manifest))
    with node.stopped():
        began = time.monotonic()
        assert asyncio.run(answer(reaching(node, tmp_path / "cache"), model.manifest)) == expected
        assert in_time(began)


@needs_js
def test_a_stage_on_a_node_that_has_nothing_yet_loads_from_another_source(
    model: Model, node: JsNode, tmp_path: Path
) -> None:
    """The stopped one is waited for once, and stands behind the mirror from then on: not once for each block."""
    with node.stopped():
        began = time.monotonic()
        store = reaching(node, tmp_path / "cache", model.root / "store")
        assert asyncio.run(answer(store, model.manifest))
        assert fetch(store, DirectoryStore(tmp_path / "target"), model.record.manifest) == model.manifest
        assert in_time(began)
    assert verify(DirectoryStore(tmp_path / "target"), model.manifest) == []


@needs_js
def test_with_no_other_source_it_is_named_in_time_and_asked_again_later(
    model: Model, node: JsNode, tmp_path: Path
) -> None:
    store, target = reaching(node, tmp_path / "cache"), DirectoryStore(tmp_path / "target")
    with node.stopped():
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=f"IPFS node {node.api}: .*(timed out|did not answer)"):
            fetch(store, target, model.record.manifest)
        assert in_time(began)
    assert fetch(store, target, model.record.manifest) == model.manifest
    assert verify(target, model.manifest) == []


@needs_js
def test_a_fetch_outlasts_a_short_stop(model: Model, node: JsNode, tmp_path: Path) -> None:
    """What was asked of it is answered when it goes on."""
    store, target = reaching(node, tmp_path / "cache"), DirectoryStore(tmp_path / "target")
    with node.stopped():
        fetching = threading.Thread(target=fetch, args=(store, target, model.record.manifest), daemon=True)
        fetching.start()
        fetching.join(ANSWER_S / 5)
        assert fetching.is_alive()
    fetching.join(BOUND_S)
    assert not fetching.is_alive() and verify(target, model.manifest) == []


@needs_js
@needs_kubo
def test_a_kubo_that_is_stopped_behind_the_node_that_is_asked_is_made_up_for_too(model: Model, tmp_path: Path) -> None:
    """The node that we ask lives, and waits for blocks by bitswap that do not come."""
    with kubo_core(tmp_path / "kubo", "") as kubo, js_node(tmp_path / "js") as js:
        for cid, block in model.blocks():
            kubo.inject(cid, block)
        js.connect(kubo.address)
        with kubo.stopped():
            began = time.monotonic()
            store = reaching(js, tmp_path / "cache", model.root / "store")
            target = DirectoryStore(tmp_path / "target")
            assert fetch(store, target, model.record.manifest) == model.manifest
            assert in_time(began) and verify(target, model.manifest) == []
