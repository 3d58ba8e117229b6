"""How fast do models move, what do fine-tunes share, and what comes into a cluster once? Only real files and sockets.

    python -m benchmarks.content_network [--parts directory http gateway join dedup nodes] [--model smollm2]

directory: publish and fetch between two folders, beside a plain verified copy of the same bytes (read, SHA-256, write,
in one thread). http: blocks of 1 MiB from a node's endpoint in another process, hashed, beside the same requests
unhashed and a plain file of Python's http.server. gateway: a model from a trustless gateway in another process, by
streams (CARs) and block by block, near and with every byte late by some milliseconds each way. join: n nodes without
the model fetch it at once; what crosses from outside. dedup: what a store grows by when a fine-tune joins its base, by
our cuts and by those of a plain 1 MiB chunker. nodes: bitswap between two js-ipfs and two Kubo cores, where
`make nodes` has installed them. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Result, save
from shard_tools.block_server import BlockServer
from shard_tools.cid import Cid, Codec
from shard_tools.fetch import fetch, load_manifest, model_blocks
from shard_tools.http_client import HttpClient, Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.sources import open_pulling, open_tiered
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.http_source import RAW, HttpSource
from shard_tools.store.memory import MemoryStore
from shard_tools.store.peers import Peers
from shard_tools.store.tiered import TieredStore

MIB = 1 << 20
ROUNDS = 5
PARTS = ("directory", "http", "gateway", "join", "dedup", "nodes")
SIGNER, SECRET = Signer.from_seed(bytes(32)), bytes(32)
Weights = dict[str, Any]  # tensors by name, of numpy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--nodes", type=int, default=8, help="that join at once")
    parser.add_argument("--blocks", type=int, default=400, help="of 1 MiB, for http")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    if a.serve:
        server = BlockServer(DirectoryStore(Path(a.serve)), "127.0.0.1", 0, SECRET)
        print(server.port, flush=True)
        sys.stdin.read()
        return 0
    figures: dict[str, Any] = {"model": a.model}
    for part in a.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures[part] = measure(part, Path(folder), a.model, a.nodes, a.blocks)
            print(part, figures[part], flush=True)
    save(Result("content_network", figures), a.out)
    joined = figures.get("join", {}).get("outside_over_model", 1.0)
    return 0 if joined <= 1.2 else 1


def measure(part: str, folder: Path, model: str, nodes: int, blocks: int) -> dict[str, Any]:
    """The figures of one part."""
    if part == "http":
        return over_http(folder, blocks)
    if part == "dedup":
        return dedup(folder, small=model == "tiny")
    if part == "nodes":
        return bitswap(folder, 4 if model == "tiny" else 32)
    checkpoint = safetensors_checkpoint(folder / "checkpoint", model)
    if part == "gateway":
        return from_gateway(folder, checkpoint)
    return directory(folder, checkpoint) if part == "directory" else join(folder, checkpoint, nodes)


def safetensors_checkpoint(folder: Path, model: str) -> Path:
    """A Hugging Face folder of the size of the model, so that nothing is converted: only bytes move."""
    from tests.tiny_models import write_tiny_checkpoint

    if model == "tiny":
        return write_tiny_checkpoint(folder, layers=2)
    # The shape of SmolLM2-135M: 30 layers of 576, 49,152 rows of vocabulary, in bfloat16; 270 MB.
    return write_tiny_checkpoint(folder, layers=30, hidden=576, vocab=49152, dtype="bfloat16", tied=True)


def directory(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """MB/s of publish and fetch, and of a plain verified copy; medians of five rounds, and of their ratios."""
    source = checkpoint / "model.safetensors"
    size = source.stat().st_size
    rates: dict[str, list[float]] = {"copy": [], "copy_on_disk": [], "publish": [], "fetch": []}
    for i in range(ROUNDS):
        store, index = DirectoryStore(folder / f"store{i}"), DirectoryIndex(folder / f"store{i}")
        target = DirectoryStore(folder / f"target{i}")
        work: dict[str, Callable[[], object]] = {
            "copy": lambda i=i: verified_copy(source, folder / f"copy{i}"),
            "copy_on_disk": lambda i=i: verified_copy(source, folder / f"disk{i}", on_disk=True),
            "publish": lambda s=store, x=index: publish(checkpoint, s, x, "m", SIGNER),
            "fetch": lambda s=store, t=target, x=index: fetch(s, t, x.resolve("m").manifest),
        }
        for name, task in work.items():
            os.sync()  # nobody pays for what another has written
            rates[name].append(size / timed(task) / 1e6)
    median = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    over = zip(rates["copy_on_disk"], rates["publish"], strict=True), zip(rates["copy"], rates["fetch"], strict=True)
    return {
        "size_mb": round(size / 1e6, 1),
        "verified_copy_mb_per_s": median["copy"],
        "verified_copy_on_disk_mb_per_s": median["copy_on_disk"],
        "publish_mb_per_s": median["publish"],
        "fetch_mb_per_s": median["fetch"],
        "publish_over_copy_on_disk": round(statistics.median(ours / plain for plain, ours in over[0]), 2),
        "fetch_over_copy": round(statistics.median(ours / plain for plain, ours in over[1]), 2),
    }


def verified_copy(source: Path, target: Path, on_disk: bool = False) -> str:
    """What fetch is held against: read, hash, write. on_disk: and flush, as publish does before it names."""
    digest = hashlib.sha256()
    with source.open("rb") as f, target.open("wb") as g:
        while piece := f.read(MIB):
            digest.update(piece)
            g.write(piece)
        if on_disk:
            g.flush()
            os.fsync(g.fileno())
    return digest.hexdigest()


def over_http(folder: Path, n: int) -> dict[str, Any]:
    """MB/s of n blocks of 1 MiB out of a node's endpoint, by threads that ask; and of a plain file over plain HTTP."""
    store = DirectoryStore(folder)
    cids = [store.put(Codec.RAW, i.to_bytes(4, "big") * (MIB // 4)) for i in range(n)]
    plain = folder / "plain"
    with plain.open("wb") as f:
        for cid in cids:
            f.write(store.get(cid))
    figures: dict[str, Any] = {"blocks": n}
    with child("-m", "benchmarks.content_network", "--serve", str(folder)) as said:
        url = f"http://127.0.0.1:{int(said)}"
        for threads in (1, 4, 8):
            source = HttpSource(url, "peer", Patience(), SECRET)
            unhashed = HttpClient(url, "peer", Patience(), SECRET)
            with ThreadPoolExecutor(threads) as pool:
                verified = timed(lambda s=source, p=pool: list(p.map(lambda cid: len(s.get(cid)), cids)))
                raw = timed(lambda c=unhashed, p=pool: list(p.map(lambda cid: _unhashed(c, cid), cids)))
            figures[f"verified_{threads}_threads_mb_per_s"] = round(n * MIB / verified / 1e6)
            figures[f"unhashed_{threads}_threads_mb_per_s"] = round(n * MIB / raw / 1e6)
    with child("-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)) as said:
        port = int(said.split("port ")[1].split()[0])
        figures["plain_http_server_mb_per_s"] = round(n * MIB / timed(lambda: _download(port, "/plain")) / 1e6)
    return figures


def from_gateway(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Seconds to fetch a model from one gateway, with and without streams; medians of three rounds that take turns."""
    root = folder / "store"
    store = DirectoryStore(root)
    record = publish(checkpoint, store, DirectoryIndex(root), "m", SIGNER)
    figures: dict[str, Any] = {"model_mb": round(sum(block.size for block in store.held()) / 1e6, 1)}
    for late_ms in (0, 5, 50):
        seconds: dict[str, list[float]] = {"streams": [], "blocks": []}
        for i in range(3):
            for how, options in (("streams", []), ("blocks", ["--no-cars"])):
                target = folder / f"target-{late_ms}-{i}-{how}"
                words = ("-m", "tests.shard_tools.gateway_double", str(root), "--delay-ms", str(late_ms), *options)
                with child(*words) as said:
                    there = open_tiered(cache=str(target), gateways=f"http://127.0.0.1:{int(said)}")
                    took = timed(lambda s=there, t=target: fetch(s, DirectoryStore(t), record.manifest))
                seconds[how].append(took)
                shutil.rmtree(target)
        figures[f"late_{late_ms}_ms"] = {how: round(statistics.median(took), 2) for how, took in seconds.items()}
    return figures


def join(folder: Path, checkpoint: Path, nodes: int) -> dict[str, Any]:
    """What n nodes that fetch one model at once take from outside, over the model's size; and how long it takes."""
    origin = Counting()
    record = publish(checkpoint, origin, DirectoryIndex(folder / "names"), "m", SIGNER)
    model = load_manifest(origin, record.manifest)
    origin.given = 0
    cluster = Cluster(folder, nodes, origin)
    try:
        seconds = timed(lambda: cluster.fetch(model.cid))
    finally:
        cluster.close()
    size = sum(len(origin.blocks[cid]) for cid in model_blocks(model, origin.get))
    return {
        "nodes": nodes,
        "model_mb": round(size / 1e6, 1),
        "outside_mb": round(origin.given / 1e6, 1),
        "outside_over_model": round(origin.given / size, 3),
        "seconds": round(seconds, 2),
        "all_nodes_mb_per_s": round(nodes * size / seconds / 1e6, 1),
    }


class Counting(MemoryStore):
    """The outside, which counts the bytes that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self._guard = 0, threading.Lock()

    @property
    def label(self) -> str:
        return "outside"

    def get(self, cid: Cid) -> bytes:
        block = super().get(cid)
        with self._guard:
            self.given += len(block)
        return block


class Cluster:
    """n nodes in this process, each with a folder and an endpoint of its own, that speak by HTTP."""

    def __init__(self, folder: Path, nodes: int, outside: Counting) -> None:
        self._roots = [folder / f"node{i}" for i in range(nodes)]
        stores = [DirectoryStore(root) for root in self._roots]
        self._late = [_Late() for _ in stores]
        pairs = zip(stores, self._late, strict=True)
        self._servers = [BlockServer(store, "127.0.0.1", 0, SECRET, late) for store, late in pairs]
        urls = [f"http://127.0.0.1:{server.port}" for server in self._servers]
        self._peers, self._outside = Peers(urls, SECRET, Patience()), outside
        for store, root, late in zip(stores, self._roots, self._late, strict=True):
            late.source = open_pulling(store, root, self._peers, lambda _: (outside,))

    def fetch(self, manifest: Cid) -> None:
        """Every node fetches the model, all at once."""

        def one(root: Path) -> Manifest:
            near = DirectoryStore(root)
            there = TieredStore(near, root / "wanted.lock", lambda cid: (*self._peers.order(cid), self._outside))
            return fetch(there, near, manifest)

        with ThreadPoolExecutor(len(self._roots)) as pool:
            list(pool.map(one, self._roots))

    def close(self) -> None:
        for server in self._servers:
            server.close()


class _Late:
    """A source that is known once all nodes have their addresses."""

    source: TieredStore
    label = "cluster"

    def get(self, cid: Cid) -> bytes:
        return self.source.get(cid)

    def has(self, cid: Cid) -> bool:
        return self.source.has(cid)


def dedup(folder: Path, small: bool) -> dict[str, Any]:
    """Percent of a model that a store grows by for each kind of fine-tune: our cuts, and a plain 1 MiB chunker's."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from tests.tiny_models import write_tiny_checkpoint

    # 303 MB in float16: layers of 22.5 MB, and a vocabulary of 16,000 that serves twice.
    wide = {"intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    large: dict[str, Any] = {"layers": 12, "hidden": 1024, "vocab": 16000, "tied": True, "shape": wide}
    shape: dict[str, Any] = {"layers": 4} if small else large
    base = write_tiny_checkpoint(folder / "base", dtype="float16", **shape)
    layers = shape["layers"]

    def changed(which: Callable[[str], bool]) -> Callable[[Weights], Weights]:
        return lambda w: {name: tensor + np.float16(0.01) if which(name) else tensor for name, tensor in w.items()}

    def one_more_row(w: Weights) -> Weights:
        grown = ("model.embed_tokens.weight", "lm_head.weight")
        return {name: np.concatenate([t, t[:1]]) if name in grown else t for name, t in w.items()}

    last = tuple(f"model.layers.{i}." for i in range(layers - 2, layers))
    tunes = {
        "last_2_layers": changed(lambda name: name.startswith(last)),
        "q_and_v_merged_lora": changed(lambda name: "q_proj" in name or "v_proj" in name),
        "one_vocab_row": one_more_row,
        "norms": changed(lambda name: "norm" in name),
    }
    weights = load_file(base / "model.safetensors")
    plain_base = chunks((base / "model.safetensors").read_bytes())
    out: dict[str, Any] = {"model_mb": round(sum(plain_base.values()) / 1e6, 1)}
    ours = DirectoryStore(folder / "store")
    publish(base, ours, DirectoryIndex(folder / "store"), "base", SIGNER)
    for name, tune in tunes.items():
        checkpoint = write_tiny_checkpoint(folder / name, dtype="float16", **shape)
        if name == "one_vocab_row":
            config = checkpoint / "config.json"
            vocab = weights["model.embed_tokens.weight"].shape[0]
            config.write_text(config.read_text().replace(f'"vocab_size": {vocab}', f'"vocab_size": {vocab + 1}'))
        save_file(tune(weights), checkpoint / "model.safetensors", metadata={"format": "pt"})
        before = {block.cid: block.size for block in ours.held()}
        publish(checkpoint, ours, DirectoryIndex(folder / "store"), name.replace("_", "-"), SIGNER)
        new = {block.cid: block.size for block in ours.held() if block.cid not in before}
        plain = chunks((checkpoint / "model.safetensors").read_bytes())
        grown = sum(size for digest, size in plain.items() if digest not in plain_base)
        total = sum(plain_base.values())
        out[name] = {
            "ours_percent": round(100 * sum(new.values()) / total, 1),
            "plain_1_mib_percent": round(100 * grown / total, 1),
        }
        for cid in new:
            ours.delete(cid)
    return out


def chunks(data: bytes) -> dict[bytes, int]:
    """The pieces of a file that a plain chunker makes, by digest."""
    return {hashlib.sha256(data[i : i + MIB]).digest(): len(data[i : i + MIB]) for i in range(0, len(data), MIB)}


def bitswap(folder: Path, n: int) -> dict[str, Any]:
    """MB/s of n leaves of 1 MiB from one IPFS node to another, on loopback; or why it was not measured."""
    from shard_tools import unixfs
    from shard_tools.store.ipfs import IpfsNode
    from tests.nodes.nodes import fresh_swarm_key, js_ipfs_missing, js_node, kubo_core, kubo_missing

    blocks: dict[Cid, bytes] = {}

    def put(codec: Codec, block: bytes) -> Cid:
        cid = Cid.of(codec, block)
        blocks[cid] = block
        return cid

    root = unixfs.put_file(os.urandom(n * MIB), put)
    figures: dict[str, Any] = {"mb": round(n * MIB / 1e6, 1)}
    if kubo_missing():
        figures["kubo"] = kubo_missing()
    else:
        key = fresh_swarm_key()
        with kubo_core(folder / "ka", key) as a, kubo_core(folder / "kb", key) as b:
            for cid, block in blocks.items():
                a.inject(cid, block)
            assert b.ask("connect", a.address) == "0"
            seconds = timed(lambda: b.ask("pin", root))
            assert all(b.block(cid) == block for cid, block in blocks.items())
            figures["kubo_bitswap_mb_per_s"] = round(n * MIB / seconds / 1e6, 1)
    if js_ipfs_missing():
        figures["js_ipfs"] = js_ipfs_missing()
        return figures
    with js_node(folder / "ja") as ja, js_node(folder / "jb") as jb:
        source, target = IpfsNode(ja.api), IpfsNode(jb.api)
        pushed = timed(lambda: source.put([root], blocks.items(), pin=True))
        jb.connect(ja.address)
        leaves = [cid for cid in blocks if cid.codec is Codec.RAW]
        with ThreadPoolExecutor(8) as pool:
            seconds = timed(lambda: list(pool.map(target.get, leaves)))
            local = timed(lambda: list(pool.map(source.get, leaves)))
    figures["js_ipfs_push_mb_per_s"] = round(n * MIB / pushed / 1e6, 1)
    figures["js_ipfs_bitswap_mb_per_s"] = round(n * MIB / seconds / 1e6, 1)
    figures["js_ipfs_own_blocks_mb_per_s"] = round(n * MIB / local / 1e6, 1)
    return figures


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def child(*words: str) -> Iterator[str]:
    """A Python process of these arguments; gives its first line, and ends it."""
    command = [sys.executable, *words]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, cwd=Path(__file__).parents[1], **pipes)
    try:
        yield process.stdout.readline()
    finally:
        process.terminate()
        process.wait(10)


def _unhashed(client: HttpClient, cid: Cid) -> int:
    return len(client.ask("GET", f"/ipfs/{cid}?format=raw", RAW, 2 * MIB).body)


def _download(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    response, total = connection.getresponse(), 0
    while piece := response.read(MIB):
        total += len(piece)
    connection.close()
    return total


if __name__ == "__main__":
    sys.exit(main())
