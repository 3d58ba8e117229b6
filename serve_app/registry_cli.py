"""`llmd registry`: the operator's list of nodes, signed where the operator's key is, which need not be the cluster.

A node's public key is printed where the node runs (`llmd registry node`), carried to the operator by hand, and comes
back in the signed file that `identity.registry` names.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.errors import InputError, LlmdError

STATE = Path("~/.llmd")  # identity.state_dir of the example config
NODE_KEY = "node.key"

_StateDir = Annotated[Path, typer.Option("--state-dir", help="identity.state_dir of the node's config.")]
_Key = Annotated[Path, typer.Option("--operator-key", help="The operator's private key; made if absent.")]
_Node = Annotated[list[str], typer.Option("--node", help="NAME=llmd-ed25519:..., once for each node.")]
_Out = Annotated[Path, typer.Option("--out", help="Where the signed registry is written.")]
_Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="How long it holds.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`, under `registry`."""
    registry = typer.Typer(no_args_is_help=True, help="Which nodes an operator answers for.")
    registry.command("node")(node)
    registry.command("sign")(sign)
    app.add_typer(registry, name="registry")


def node(state_dir: _StateDir = STATE) -> None:
    """Print this node's public key, made if absent."""

    def work() -> None:
        from serve_app.receipts.identity import NodeIdentity
        from shard_tools.signing import key_text

        typer.echo(key_text(NodeIdentity.load_or_create(state_dir.expanduser() / NODE_KEY).key))

    _exit_with(work)


def sign(node: _Node, operator_key: _Key, out: _Out, days: _Days = 30) -> None:
    """Sign a registry of these nodes, and write the operator's public key beside it."""

    def work() -> None:
        from serve_app.receipts.identity import RegisteredNode, Registry
        from shard_tools import canonical
        from shard_tools.signing import Signer, key_text, parse_key

        nodes = []
        for text in node:
            name, equals, key = text.partition("=")
            if not equals or not name:
                raise InputError(f"--node {text!r}: expected NAME=llmd-ed25519:...")
            nodes.append(RegisteredNode(parse_key(key), name))
        operator, now_s = Signer.load_or_create(operator_key.expanduser()), int(time.time())
        registry = Registry.of(nodes, now_s, now_s, days * 86_400)
        out.write_bytes(canonical.encode(registry.seal(operator).to_value()))
        out.with_suffix(".operator.pub").write_text(key_text(operator.public) + "\n")
        typer.echo(f"{out}: {len(nodes)} nodes for {days} days, signed by {key_text(operator.public)}")

    _exit_with(work)


def _exit_with(work: Callable[[], None]) -> None:
    try:
        work()
    except (LlmdError, OSError) as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e
