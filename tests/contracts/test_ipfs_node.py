"""The laws of BlockSource and ModelIndex, over a real IPFS node: js-ipfs, asked through ipfshttpclient."""

# ruff: noqa: F403  # a suite is taken over whole, and its fixtures are replaced below

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from shard_tools.cid import Cid, Codec
from shard_tools.http_client import Patience
from shard_tools.index.model_index import ModelIndex
from shard_tools.store.block_store import BlockSource
from tests.contracts.test_block_source import *
from tests.contracts.test_model_index import *
from tests.nodes.nodes import JsNode, js_ipfs_missing, js_node

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(js_ipfs_missing()), reason=js_ipfs_missing())]


class Node:
    """What the suite needs of an origin, of a node."""

    def __init__(self, node: JsNode) -> None:
        from shard_tools.store.ipfs import IpfsNode

        self.js, self.rpc = node, IpfsNode(node.api, Patience(answer_s=2))

    def put(self, codec: Codec, block: bytes) -> Cid:
        cid = Cid.of(codec, block)
        self.rpc.put([cid], [(cid, block)], pin=False)
        return cid

    def delete(self, cid: Cid) -> None:
        self.js.rpc("block/rm", str(cid))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsNode]:
    with js_node(tmp_path_factory.mktemp("js") / "repo") as node:
        yield node


@pytest.fixture
def origin(node: JsNode) -> Node:
    return Node(node)


@pytest.fixture
def source(origin: Node) -> BlockSource:
    return origin.rpc


@pytest.fixture
def damage(node: JsNode) -> Callable[[Cid, bytes], None]:
    def damaged(cid: Cid, block: bytes) -> None:
        node.block_file(cid).write_bytes(block)

    return damaged


@pytest.fixture
def index(node: JsNode) -> ModelIndex:
    """A name of a key of its own, which has published nothing."""
    from shard_tools.index.ipns import open_ipns

    made = node.rpc("key/gen", secrets.token_hex(8), type="ed25519").json()
    return open_ipns(name=made["Id"], api=node.api, key=made["Name"])
