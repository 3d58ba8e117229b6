"""`llmd blocks` and `llmd ipfs`: a node's blocks for the others of its cluster, and models into IPFS nodes."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.block_server import BlockServer
from shard_tools.cluster_key import create_key, load_key
from shard_tools.console import STORE, StoreOption, line, refusals
from shard_tools.errors import InputError
from shard_tools.fetch import load_manifest, model_blocks
from shard_tools.fetch_cli import (
    ClusterKeyOption,
    GatewayOption,
    HubOption,
    IpfsOption,
    MirrorOption,
    PeerOption,
    RangesOption,
    absolute,
)
from shard_tools.http_client import Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.keeping import StorePins
from shard_tools.sources import KEY as CLUSTER_KEY
from shard_tools.sources import open_pulling, outside
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.peers import Peers

DEFAULT_IPFS = "/ip4/127.0.0.1/tcp/5001/http"


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    blocks = typer.Typer(no_args_is_help=True, help="A node's blocks, for the other nodes of its cluster.")
    blocks.command("serve")(blocks_serve)
    blocks.command("key")(blocks_key)
    app.add_typer(blocks, name="blocks")
    ipfs = typer.Typer(no_args_is_help=True, help="Models in IPFS nodes.")
    ipfs.command("push")(ipfs_push)
    app.add_typer(ipfs, name="ipfs")


def blocks_key(cluster_key: ClusterKeyOption = CLUSTER_KEY) -> None:
    """Make the key that the nodes of a cluster share; copy its file to each of them."""
    with refusals():
        path = Path(cluster_key).expanduser()
        create_key(path)
        line(f"Wrote {path}; copy it, mode 0600, to every node of the cluster.")


def blocks_serve(
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT to serve at.")] = "127.0.0.1:8190",
    store: StoreOption = STORE,
    peer: PeerOption = [],  # noqa: B006  # typer copies it
    cluster_key: ClusterKeyOption = CLUSTER_KEY,
    ipfs: IpfsOption = "",
    gateway: GatewayOption = [],  # noqa: B006
    mirror: MirrorOption = [],  # noqa: B006
    hub: HubOption = "",
    ranges: RangesOption = "",
    public: Annotated[bool, typer.Option("--public", help="Without the key: on loopback, for anybody there.")] = False,
) -> None:
    """Serve this store's blocks and names to the cluster until Ctrl-C, and get for it what none of its nodes has."""
    with refusals():
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise InputError(f"--listen {listen!r}: expected HOST:PORT")
        if public and peer:
            raise InputError("--peer needs the cluster's key, and --public goes without: leave one of them out")
        root = store.expanduser().absolute()
        secret = None if public else load_key(Path(cluster_key).expanduser())
        near, patience = DirectoryStore(root), Patience()
        peers = Peers(peer, secret, patience) if peer and secret is not None else None
        pull = None
        if peers or ipfs or gateway or mirror or hub or ranges:
            far = outside(ipfs, " ".join(gateway), " ".join(mirror), patience)
            pull = open_pulling(near, root, peers, far, hub, absolute(ranges))
        server = BlockServer(near, host.strip("[]"), int(port), secret, pull, DirectoryIndex(root), StorePins(root))
        line(f"Serving {near.label} at http://{host}:{server.port} until Ctrl-C")
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        try:
            stopped.wait()
        finally:
            server.close()


def ipfs_push(
    name: Annotated[str, typer.Argument(help="Name of the model in the store.")],
    api: Annotated[str, typer.Option("--api", help="RPC of the node.")] = DEFAULT_IPFS,
    ipns: Annotated[str, typer.Option("--ipns", help="Key of the node, to publish the name by in IPNS too.")] = "",
    store: StoreOption = STORE,
) -> None:
    """Put a model into an IPFS node and pin it there; with --ipns, anybody who knows that key's name finds it."""
    with refusals(resume="Stopped. Run the same command again."):
        from shard_tools.store.ipfs import IpfsNode  # its package is an extra

        root = store.expanduser()
        blocks, node = DirectoryStore(root), IpfsNode(api, Patience())
        record = DirectoryIndex(root).resolve(name)
        model = load_manifest(blocks, record.manifest)
        cids = [record.signature, *model_blocks(model, blocks.get)]
        node.put([record.manifest, record.signature], ((cid, blocks.get(cid)) for cid in cids), pin=True)
        line(f"Pushed {name} {record.manifest} to {node.label} ({node.version()}), and pinned it")
        if ipns:
            from shard_tools.index.ipns import IpnsIndex

            index = IpnsIndex.of_key(node, ipns)
            index.publish(name, record, blocks.has)
            line(f"Named in IPNS: llmd fetch {name} --ipfs {api} --index {index.name}")
