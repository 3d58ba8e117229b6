"""`llmd pin`, `unpin`, `gc`, `availability` and `keep`: what a store keeps, who else has it, and who is to have it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.availability import SAMPLE, availability, weakest
from shard_tools.cid import Cid
from shard_tools.cluster_key import load_key
from shard_tools.console import STORE, StoreOption, line, refusals
from shard_tools.errors import FormatError, InputError
from shard_tools.fetch import load_manifest, model_blocks
from shard_tools.fetch_cli import ClusterKeyOption, GatewayOption, IpfsOption, MirrorOption, PeerOption
from shard_tools.http_client import Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.keeping import GRACE_S, Pins, collect, filling
from shard_tools.replication import Keeper, NodeKeeper, PeerKeeper, keep_copies
from shard_tools.sources import KEY as CLUSTER_KEY
from shard_tools.sources import each_outside
from shard_tools.store.block_store import BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.http_source import HttpSource

ModelArgument = Annotated[str, typer.Argument(help="Name, or CID of a manifest.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("pin")(pin)
    app.command("unpin")(unpin)
    app.command("gc")(gc)
    app.command("availability")(show_availability)
    app.command("keep")(keep)


def pin(model: ModelArgument, store: StoreOption = STORE) -> None:
    """Keep a model, or the part of it that is here, whatever happens to its name."""
    with refusals():
        root = store.expanduser()
        cid = _manifest(model, root)
        with filling(root):
            load_manifest(DirectoryStore(root), cid)  # what is pinned can be walked, or nothing could ever be collected
            Pins(root).add(cid)
        line(f"Pinned {cid}")


def unpin(model: ModelArgument, store: StoreOption = STORE) -> None:
    """Drop a pin. Blocks stay until `llmd gc`, and as long as a name needs them."""
    with refusals():
        root = store.expanduser()
        cid = _manifest(model, root)
        Pins(root).remove(cid)
        line(f"Unpinned {cid}")


def gc(
    store: StoreOption = STORE,
    grace_s: Annotated[float, typer.Option("--grace-s", min=0, help="Blocks younger than this stay.")] = GRACE_S,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove the blocks that no named or pinned model needs."""
    with refusals():
        found = collect(store.expanduser(), time.time(), grace_s, dry)
        would = "Would remove" if dry else "Removed"
        line(f"{would} {found.removed} blocks, {found.removed_bytes / 1e6:.1f} MB")
        line(f"{found.kept} blocks stay, {found.kept_bytes / 1e6:.1f} MB")


def show_availability(
    model: ModelArgument,
    store: StoreOption = STORE,
    peer: PeerOption = [],  # noqa: B006  # typer copies it
    cluster_key: ClusterKeyOption = CLUSTER_KEY,
    ipfs: IpfsOption = "",
    gateway: GatewayOption = [],  # noqa: B006
    mirror: MirrorOption = [],  # noqa: B006
    sample: Annotated[int, typer.Option("--sample", min=0, help="Blocks of a layer to ask for; 0: all.")] = SAMPLE,
) -> None:
    """Say of each layer which nodes, gateways and folders hold it, and which layer is the weakest link."""
    with refusals():
        root, patience = store.expanduser(), Patience()
        near = DirectoryStore(root)
        found = load_manifest(near, _manifest(model, root))
        secret = load_key(Path(cluster_key).expanduser()) if peer else None
        sources: list[BlockSource] = [near, *(HttpSource(url, "peer", patience, secret, depth=1) for url in peer)]
        sources += each_outside(ipfs, " ".join(gateway), " ".join(mirror), patience)
        held = availability(found, sources, sample)
        for unit in held:
            line(f"{unit.label:<10} {unit.replicas} of {len(sources)}")
            for label, share in unit.shares:
                if share != 1.0:
                    line(f"           {label}: {'no answer' if share is None else f'{share:.0%}'}")
        least = weakest(held)
        asked = "every block was asked for" if sample == 0 else f"{sample} blocks of each were asked for"
        line(f"Weakest link: {least.label}, {least.replicas} whole copies ({asked})")


def keep(
    name: Annotated[str, typer.Argument(help="Name of the model in the store.")],
    peer: PeerOption = [],  # noqa: B006  # typer copies it
    cluster_key: ClusterKeyOption = CLUSTER_KEY,
    api: Annotated[list[str], typer.Option("--api", help="RPC of an IPFS node; one for each.")] = [],  # noqa: B006
    copies: Annotated[int, typer.Option("--copies", min=1, help="Nodes that are to keep it.")] = 2,
    every_s: Annotated[float, typer.Option("--every-s", min=0, help="Look again so often; 0: once.")] = 0.0,
    store: StoreOption = STORE,
) -> None:
    """See that enough nodes of the cluster and IPFS nodes keep a model; those that lack it get it from the others."""
    with refusals():
        if not (peer or api):
            raise InputError("say which nodes: --peer, --api")
        record = DirectoryIndex(store.expanduser()).resolve(name)
        near = DirectoryStore(store.expanduser())
        blocks = list(model_blocks(load_manifest(near, record.manifest), near.get))
        secret, patience = load_key(Path(cluster_key).expanduser()) if peer else b"", Patience()
        keepers: list[Keeper] = [PeerKeeper(url, secret, patience, record.manifest, blocks) for url in peer]
        if api:
            from shard_tools.store.ipfs import IpfsNode  # its package is an extra

            links = record.manifest, record.signature
            keepers += [NodeKeeper(IpfsNode(text, patience), links) for text in api]
        while True:
            found = keep_copies(keepers, copies)
            for label in found.kept:
                line(f"{label} {'keeps it from now on' if label in found.made else 'keeps it'}")
            for label, problem in found.problems:
                line(f"{label} does not: {problem}")
            if not every_s:
                break
            time.sleep(every_s)
        if len(found.kept) < copies:
            raise InputError(
                f"{len(found.kept)} nodes keep {name}, and {copies} should: start more, or name more by --peer or --api"
            )


def _manifest(text: str, root: Path) -> Cid:
    try:
        return Cid.parse(text)
    except FormatError:
        return DirectoryIndex(root).resolve(text).manifest
