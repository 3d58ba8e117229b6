"""`llmd fetch`: a model comes into a directory from wherever it is, by name or by CID."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.catalog import find_model, open_cid
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.console import (
    KEY,
    STORE,
    KeyOption,
    StoreOption,
    TrustOption,
    line,
    progress_bar,
    refusals,
    trusted_keys,
)
from shard_tools.errors import FormatError, InputError
from shard_tools.fetch import fetch as fetch_model
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.indexes import open_index
from shard_tools.index.model_index import ModelRecord, NameSource
from shard_tools.index.seen import SeenVersions
from shard_tools.keeping import Pins, filling
from shard_tools.manifest import Manifest
from shard_tools.sources import KEY as CLUSTER_KEY
from shard_tools.store.block_store import BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.stores import open_store

ClusterKeyOption = Annotated[str, typer.Option("--cluster-key", help="File of the cluster's key, for --peer.")]
IpfsOption = Annotated[str, typer.Option("--ipfs", help="RPC of an IPFS node, such as /ip4/127.0.0.1/tcp/5001/http.")]
GatewayOption = Annotated[list[str], typer.Option("--gateway", help="A trustless gateway, https://host.")]
MirrorOption = Annotated[list[str], typer.Option("--mirror", help="Absolute path of another store.")]
HubOption = Annotated[str, typer.Option("--hub", help="Original files: https://huggingface.co/.../resolve/main.")]
RangesOption = Annotated[str, typer.Option("--ranges", help="What --hub holds: ranges/<CID> of the publisher.")]
PeerOption = Annotated[list[str], typer.Option("--peer", help="A node of the cluster, http://host:port.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("fetch")(fetch)


def fetch(
    model: Annotated[str, typer.Argument(help="Name of the model, or CID of its manifest.")],
    source: Annotated[Path | None, typer.Option("--from", help="Another store: blocks and names.")] = None,
    peer: PeerOption = [],  # noqa: B006  # typer copies it
    cluster_key: ClusterKeyOption = CLUSTER_KEY,
    ipfs: IpfsOption = "",
    gateway: GatewayOption = [],  # noqa: B006
    mirror: MirrorOption = [],  # noqa: B006
    hub: HubOption = "",
    ranges: RangesOption = "",
    index: Annotated[
        str, typer.Option("--index", help="What knows names: http(s)://..., an IPNS name, a folder.")
    ] = "",
    store: StoreOption = STORE,
    layers: Annotated[str, typer.Option("--layers", help="Only a stage's layers a:b, half-open.")] = "",
    trust: TrustOption = [],  # noqa: B006
    key: KeyOption = KEY,
) -> None:
    """Copy a model, every block verified; fetches only what is missing, from several sources at once."""
    with refusals(resume="Stopped. Run the same command again: it keeps the blocks already fetched."):
        root = store.expanduser()
        local = DirectoryStore(root)
        if source is not None:
            if peer or ipfs or gateway or mirror or hub:
                raise InputError("--from is a whole source; leave out --peer, --ipfs, --gateway, --mirror and --hub")
            if not (source.expanduser() / "blocks").is_dir():
                raise InputError(f"{source} is no store: it has no blocks/")
            remote: BlockSource = DirectoryStore(source.expanduser())
        else:
            lists = {"peers": " ".join(peer), "gateways": " ".join(gateway), "mirrors": " ".join(mirror)}
            lists |= {"hub": hub, "hub_ranges": absolute(ranges)}
            if not (ipfs or any(lists.values())):
                raise InputError("say where from: --from, --peer, --ipfs, --gateway, --mirror or --hub")
            remote = open_store(
                Choice.of("tiered", cache=str(root.absolute()), ipfs=ipfs, cluster_key=cluster_key, **lists)
            )
        record, found = None, _by_cid(model, remote)
        if found is None:
            names = _index(index, source, peer, cluster_key, ipfs)
            seen = SeenVersions(root / "seen")
            record, found = find_model(model, names, remote, trusted_keys(trust, key), int(time.time()), seen)
        span = _layers(layers, found)
        with filling(root):
            with progress_bar() as progress:
                fetch_model(remote, local, found.cid, layers=span, progress=progress)
            _finish(local, remote, root, found, record, span)


def _finish(
    local: DirectoryStore,
    remote: BlockSource,
    root: Path,
    model: Manifest,
    record: ModelRecord | None,
    span: tuple[int, int] | None,
) -> None:
    """The fetched model has its name, if it is whole and came by one; else it is pinned, or the next gc took it."""
    if record is not None:
        local.put(record.signature.codec, remote.get(record.signature))  # a stage opens its part by it too
    if span is not None:
        Pins(root).add(model.cid)
        line(f"Fetched layers {span[0]}:{span[1]} of manifest {model.cid}; a part of a model is pinned, not named.")
    elif record is None:
        Pins(root).add(model.cid)
        line(f"Fetched manifest {model.cid} ({model.name}); a model fetched by its CID is pinned, not named.")
    else:
        DirectoryIndex(root).publish(model.name, record, local.has)
        line(f"Fetched {model.name} {model.cid}")


def _by_cid(text: str, remote: BlockSource) -> Manifest | None:
    """The manifest, if the text is its CID."""
    try:
        cid = Cid.parse(text)
    except FormatError:
        return None
    return open_cid(cid, remote)


def _index(text: str, source: Path | None, peer: list[str], cluster_key: str, ipfs: str) -> NameSource:
    """What --index says; without it, the folder of --from, or the first peer."""
    if text.startswith(("http://", "https://")):
        return open_index(Choice.of("http", url=text))
    if text and "/" not in text:
        return open_index(Choice.of("ipns", name=text, **({"api": ipfs} if ipfs else {})))
    if text:
        return open_index(Choice.of("directory", path=str(Path(text).expanduser().absolute())))
    if source is not None:
        return DirectoryIndex(source.expanduser())
    if peer:
        return open_index(Choice.of("http", url=peer[0], cluster_key=cluster_key))
    raise InputError("who knows names? Say --index with an address, an IPNS name or a folder; or fetch by CID")


def absolute(path: str) -> str:
    """As a config has it; empty stays empty."""
    return str(Path(path).expanduser().absolute()) if path else ""


def _layers(text: str, model: Manifest) -> tuple[int, int] | None:
    if not text:
        return None
    start, colon, stop = text.partition(":")
    if colon and start.isdecimal() and stop.isdecimal() and 0 <= int(start) < int(stop) <= model.n_layers:
        return int(start), int(stop)
    raise InputError(f"--layers {text!r}: expected a:b with 0 <= a < b <= {model.n_layers}")
