"""The stores of a config that reach beyond one directory: `tiered`, and `peers`, `gateway` and `ipfs`, its short forms.

All keep what they got in a directory, `cache`. Lists are text, separated by spaces: options are plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from shard_tools.choice import absolute_path
from shard_tools.cid import Cid
from shard_tools.cluster_key import load_key
from shard_tools.errors import InputError, NotFoundError
from shard_tools.fetch import load_manifest
from shard_tools.http_client import ANSWER_S, Patience
from shard_tools.keeping import Quota
from shard_tools.ranges import read_map
from shard_tools.store.block_store import BlockSource
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.gateway import Gateway
from shard_tools.store.hub import HubSource, Span
from shard_tools.store.peers import Peers
from shard_tools.store.tiered import HEDGE_S, TOTAL_S, Haste, Order, TieredStore

KEY = "~/.llmd/keys/cluster.key"
_SECONDS = 0.05, 3600.0  # what a time in a config may be


def open_tiered(
    *,
    cache: str,
    peers: str = "",
    cluster_key: str = KEY,
    ipfs: str = "",
    gateways: str = "",
    mirrors: str = "",
    hub: str = "",
    hub_ranges: str = "",
    hedge_s: float = HEDGE_S,
    answer_s: float = ANSWER_S,
    total_s: float = TOTAL_S,
    quota_gb: float = 0.0,
) -> TieredStore:
    """The store `{kind: tiered, cache: folder, ...}`: cache, peers, IPFS node, gateways, mirrors, hub, in that order.

    peers: http://host:port of every node of the cluster, this one among them. ipfs: multiaddr of a node's RPC.
    gateways: https://host... mirrors: absolute paths of other stores. hub: where the model's original files are, as
    https://huggingface.co/<org>/<model>/resolve/<revision>, and hub_ranges: the file that says which blocks they hold.
    quota_gb: what the cache may hold, of which named and pinned models never go; 0: anything. Raises InputError.
    """
    haste, patience = Haste(_seconds(hedge_s), _seconds(total_s)), Patience(answer_s=_seconds(answer_s))
    near = DirectoryStore(absolute_path(cache))
    far = outside(ipfs, gateways, mirrors, patience)
    order = far
    if peers.split():
        known = Peers(peers.split(), load_key(absolute_path(cluster_key)), patience)
        order = lambda cid: (*known.order(cid), *far(cid))
    elif not (ipfs or gateways.split() or mirrors.split() or hub):
        raise InputError("a tiered store needs at least one of the options peers, ipfs, gateways, mirrors and hub")
    order = with_hub(order, hub, hub_ranges, near, lock_of(cache), patience)
    return TieredStore(near, lock_of(cache), order, haste, _quota(quota_gb, absolute_path(cache)))


def open_peers(*, cache: str, addresses: str, cluster_key: str = KEY) -> TieredStore:
    """The store `{kind: peers, cache: folder, addresses: "http://a:8190 http://b:8190"}`. Raises InputError."""
    return open_tiered(cache=cache, peers=addresses, cluster_key=cluster_key)


def open_gateway(*, cache: str, urls: str) -> TieredStore:
    """The store `{kind: gateway, cache: folder, urls: "https://a https://b"}`. Raises InputError."""
    return open_tiered(cache=cache, gateways=urls)


def open_ipfs(*, cache: str, api: str = "/ip4/127.0.0.1/tcp/5001/http") -> TieredStore:
    """The store `{kind: ipfs, cache: folder, api: multiaddr}`. Raises InputError."""
    return open_tiered(cache=cache, ipfs=api)


def open_pulling(
    near: DirectoryStore, root: Path, peers: Peers | None, far: Order, hub: str = "", ranges: str = ""
) -> TieredStore:
    """What a node's endpoint gets a block from that it lacks: what other nodes hold, then outside; hub as of with_hub.

    It has a lock of its own: whoever waits for this node's answer on the same machine holds the other.
    """

    def order(cid: Cid) -> tuple[BlockSource, ...]:
        return (*(peers.holders(cid) if peers else ()), *far(cid))

    lock = root / "pulling.lock"
    return TieredStore(near, lock, with_hub(order, hub, ranges, near, lock, Patience()))


def outside(ipfs: str, gateways: str, mirrors: str, patience: Patience) -> Order:
    """The sources beyond the cluster: node, gateways (taking turns, so that all carry), mirrors. Raises InputError."""
    first = each_outside(ipfs, "", "", patience)
    doors = each_outside("", gateways, "", patience)
    last = each_outside("", "", mirrors, patience)

    def order(cid: Cid) -> tuple[BlockSource, ...]:
        turn = cid.digest[0] % len(doors) if doors else 0
        return (*first, *doors[turn:], *doors[:turn], *last)

    return order


def each_outside(ipfs: str, gateways: str, mirrors: str, patience: Patience) -> list[BlockSource]:
    """The sources that a person named, in the order of the kinds. Raises InputError."""
    out: list[BlockSource] = []
    if ipfs:
        from shard_tools.store.ipfs import IpfsNode  # its package is an extra

        out.append(IpfsNode(ipfs, patience))
    out += [Gateway(url, patience) for url in gateways.split()]
    out += [DirectoryStore.mirror(absolute_path(path)) for path in mirrors.split()]
    return out


def with_hub(order: Order, hub: str, ranges: str, near: DirectoryStore, lock: Path, patience: Patience) -> Order:
    """The order, and behind it the original files at `hub`, if it is named; ranges: the file that says what they hold.

    The manifest, without which nobody knows a leaf's place, comes from the others. Raises InputError, and FormatError
    for what is no range map.
    """
    if not (hub or ranges):
        return order
    if not (hub and ranges):
        raise InputError("a hub is an address and a range map: give both, hub and hub_ranges (--hub and --ranges)")
    found, others = read_map(absolute_path(ranges)), TieredStore(near, lock, order)

    def spans() -> Mapping[Cid, Span]:
        try:
            return found.spans(load_manifest(others, found.manifest))
        except NotFoundError:
            return {}

    source = HubSource(hub, spans, patience)
    return lambda cid: (*order(cid), source)


def lock_of(cache: str) -> Path:
    """The file by which those who want a block of this cache wait for each other."""
    return absolute_path(cache) / "wanted.lock"


def _quota(quota_gb: float, root: Path) -> Callable[[int], None] | None:
    if isinstance(quota_gb, bool) or not isinstance(quota_gb, int | float) or not 0 <= quota_gb <= 1e6:
        raise InputError(f"{quota_gb!r} is no quota: expected gigabytes, 0 for none")
    return Quota(root, int(quota_gb * 1e9)).grew if quota_gb else None


def _seconds(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SECONDS[0] <= value <= _SECONDS[1]:
        raise InputError(f"{value!r} is no time: expected {_SECONDS[0]} to {_SECONDS[1]:.0f} seconds")
    return float(value)
