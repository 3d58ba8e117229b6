"""`llmd node`: one IPFS node on this machine, in a private swarm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.console import HOME, line, refusals
from shard_tools.ipfs_daemon import DaemonSettings, prepare, write_swarm_key

SwarmKeyOption = Annotated[Path, typer.Option("--swarm-key", help="File of the private swarm's key.")]
SWARM_KEY = HOME / "keys" / "swarm.key"


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    node = typer.Typer(no_args_is_help=True, help="An IPFS node (Kubo) in a private swarm.")
    node.command("key")(node_key)
    node.command("start")(node_start)
    app.add_typer(node, name="node")


def node_key(swarm_key: SwarmKeyOption = SWARM_KEY) -> None:
    """Make the key of a private swarm; copy its file to every node of it."""
    with refusals():
        path = swarm_key.expanduser()
        write_swarm_key(path)
        line(f"Wrote {path}; copy it, mode 0600, to every node of the swarm.")


def node_start(
    repo: Annotated[Path, typer.Option("--repo", help="The node's repository; made if absent.")] = HOME / "ipfs",
    swarm_key: SwarmKeyOption = SWARM_KEY,
    peer: Annotated[list[str], typer.Option("--peer", help="Another node, /ip4/.../tcp/.../p2p/...")] = [],  # noqa: B006
    swarm_port: Annotated[int, typer.Option("--swarm-port", min=1, max=65535)] = 4001,
    api_port: Annotated[int, typer.Option("--api-port", min=1, max=65535, help="On loopback.")] = 5001,
    gateway_port: Annotated[int, typer.Option("--gateway-port", min=1, max=65535, help="On loopback.")] = 8080,
    binary: Annotated[str, typer.Option("--binary", help="Kubo's program.")] = "ipfs",
) -> None:
    """Run a Kubo here until Ctrl-C: no public network, no bootstrap, its RPC on loopback."""
    with refusals():
        settings = DaemonSettings(swarm_port, api_port, gateway_port, tuple(peer))
        command, environment = prepare(binary, repo.expanduser().absolute(), swarm_key.expanduser(), settings)
        line(f"Its RPC: /ip4/127.0.0.1/tcp/{api_port}/http")
    os.execve(command[0], command, {**os.environ, **environment})
