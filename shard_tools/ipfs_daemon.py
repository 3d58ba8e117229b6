"""One Kubo per host, in a private swarm: its repository made, its configuration set, and what to run.

Nothing here talks to a node. Kubo itself is not ours to ship: where it is not installed, the error says how to get it.
The settings are Kubo's, of version 0.40 (https://github.com/ipfs/kubo/blob/master/docs/config.md).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shard_tools import secret_file
from shard_tools.errors import InputError

HOW_TO_GET = (
    "Install Kubo 0.40 or newer (https://docs.ipfs.tech/install/command-line/, or the container image ipfs/kubo), or "
    "say where it is with --binary. A cluster needs none: `llmd blocks serve` moves blocks between its nodes."
)
ARGUMENTS = ("daemon", "--migrate=true")
ENVIRONMENT = {"IPFS_TELEMETRY": "off", "LIBP2P_FORCE_PNET": "1"}  # 1: without the swarm's key it does not run
_INIT_S = 60.0
_HEADER = "/key/swarm/psk/1.0.0/\n/base16/\n"
_SCRIPT = """\
#!/bin/sh
# A private swarm. Written by shard_tools.ipfs_daemon.container_script, which says why; tests/kuberay holds them equal.
set -e
install -m 0600 /run/secrets/swarm.key "$IPFS_PATH/swarm.key"
"""
_PEER = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[0-9A-Za-z.:-]+/tcp/\d+/p2p/[A-Za-z0-9]{40,80}")


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """swarm_port: open to the other nodes. api_port, gateway_port: at `host`, which is this machine alone unless a
    container's network stands around the node. peers: multiaddrs kept connected.
    """

    swarm_port: int = 4001
    api_port: int = 5001
    gateway_port: int = 8080
    peers: tuple[str, ...] = ()
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        for peer in self.peers:
            if not _PEER.fullmatch(peer):
                raise InputError(f"{peer[:200]!r} is no node: expected /ip4/10.0.0.7/tcp/4001/p2p/12D3Koo...")


def private_swarm(settings: DaemonSettings) -> dict[str, Any]:
    """What Kubo's configuration must say, key by key: nobody from outside is asked, and only TCP is used."""
    here = f"/ip4/{settings.host}/tcp/{{}}".format
    return {
        "Bootstrap": [],
        "Addresses.Swarm": [f"/ip4/0.0.0.0/tcp/{settings.swarm_port}", f"/ip6/::/tcp/{settings.swarm_port}"],
        "Addresses.API": here(settings.api_port),  # it commands the node
        "Addresses.Gateway": here(settings.gateway_port),
        "Discovery.MDNS.Enabled": False,
        "AutoConf.Enabled": False,  # it would fill in the public bootstrap and routers; refused in a private swarm
        "AutoTLS.Enabled": False,  # asks a public service for certificates
        "Routing.Type": "dht",
        "Routing.DelegatedRouters": [],
        "DNS.Resolvers": {},
        "Ipns.DelegatedPublishers": [],
        "Peering.Peers": [_peering(peer) for peer in settings.peers],
        "Swarm.DisableNatPortMap": True,
        "Swarm.RelayClient.Enabled": False,
        "Swarm.RelayService.Enabled": False,
        # A swarm key works over TCP alone.
        "Swarm.Transports.Network": dict.fromkeys(
            ("QUIC", "WebTransport", "WebRTCDirect", "Websocket", "Relay"), False
        ),
    }


def configured(config: dict[str, Any], settings: DaemonSettings) -> dict[str, Any]:
    """Kubo's configuration for a private swarm; what is not said there stays as it is.

    Law: configured(configured(c, s), s) == configured(c, s).
    """
    out: dict[str, Any] = json.loads(json.dumps(config))
    for key, value in private_swarm(settings).items():
        *above, last = key.split(".")
        place = out
        for name in above:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    return out


def container_script(settings: DaemonSettings) -> str:
    """What the image ipfs/kubo runs before its daemon (/container-init.d): the same, by the node's own command.

    Law: run over a configuration, it leaves what `configured` makes of it.
    """
    lines = (f"ipfs config --json {key} '{json.dumps(value)}'" for key, value in private_swarm(settings).items())
    return _SCRIPT + "\n".join(lines) + "\n"


def write_swarm_key(path: Path) -> None:
    """A fresh key of a private swarm is in a new file of mode 0600. Raises InputError if there is one."""
    secret_file.create(path, "swarm key", f"{_HEADER}{secrets.token_hex(32)}\n")


def prepare(binary: str, repo: Path, swarm_key: Path, settings: DaemonSettings) -> tuple[list[str], dict[str, str]]:
    """The repository is there and set up; returns the command that runs the node, and what its environment needs.

    Raises InputError where Kubo is not installed, does not make a repository, or the swarm key cannot be read.
    """
    path = shutil.which(binary)
    if path is None:
        raise InputError(f"there is no program {binary!r} on this machine. {HOW_TO_GET}")
    key = _read_swarm_key(swarm_key)
    environment = {"IPFS_PATH": str(repo), **ENVIRONMENT}
    config = repo / "config"
    try:
        repo.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not config.exists():
            command = [path, "init", "--empty-repo"]
            made = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=_INIT_S, check=False
            )
            if made.returncode != 0 or not config.exists():
                raise InputError(f"{path} made no repository in {repo}: {made.stderr.strip()[-500:]}")
        value = json.loads(config.read_text())
        if not isinstance(value, dict):
            raise InputError(f"{config} is no configuration of Kubo")
        _replace(config, json.dumps(configured(value, settings), indent=2) + "\n")
        _replace(repo / "swarm.key", key)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise InputError(f"cannot set up an IPFS node in {repo}: {e}") from e
    return [path, *ARGUMENTS], environment


def _read_swarm_key(path: Path) -> str:
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_bytes()[:200].decode("ascii", "replace")
    except OSError as e:
        raise InputError(f"cannot read the swarm key {path}: {e.strerror}. Make one: llmd node key") from e
    if mode & 0o077:
        raise InputError(f"the swarm key {path} has mode {mode:o}: others may read it. Run: chmod 600 {path}")
    if not re.fullmatch(re.escape(_HEADER) + r"[0-9a-fA-F]{64}\n?", text):
        raise InputError(f"{path} is no swarm key: expected {_HEADER.splitlines()} and 64 hex digits")
    return text


def _peering(peer: str) -> dict[str, Any]:
    address, _, identity = peer.rpartition("/p2p/")
    return {"ID": identity, "Addrs": [address]}


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # Kubo's configuration holds its private key
    with os.fdopen(fd, "w") as f:
        f.write(text)
    fresh.replace(path)
