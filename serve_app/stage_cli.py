"""`llmd stage`: a stage of somebody else's pipeline, without Ray. What it decides itself is on its command line."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shard_tools.errors import InputError, LlmdError

if TYPE_CHECKING:
    from shard_tools.signing import PublicKey

_Listen = Annotated[str, typer.Option("--listen", help="host:port where orders are taken; edges use the same host.")]
_Controller = Annotated[
    list[str],
    typer.Option(
        "--controller",
        help="Public key, or file of one, of a node whose Supervisor may give orders (`llmd registry node` prints it "
        "there). Once for each node of the cluster that the Supervisor may run on.",
    ),
]
_Store = Annotated[Path, typer.Option("--store", help="Folder of this stage's own blocks (`llmd fetch --layers a:b`).")]
_Trust = Annotated[
    list[str], typer.Option("--trust", help="Publishers whose models it serves: keys, files, or one trust root.")
]
_StateDir = Annotated[Path, typer.Option("--state-dir", help="Where its node key is kept; made if absent.")]
_Layers = Annotated[str, typer.Option("--layers", help="It may be asked for layers a:b alone, half-open; empty: any.")]
_Device = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="What it computes on.")]
_Engine = Annotated[str, typer.Option("--engine", help="As pipeline.engine: auto, or one by name.")]
_Threads = Annotated[int, typer.Option("--threads", min=1, max=1024, help="That compute.")]
_KvMemory = Annotated[int, typer.Option("--kv-memory-bytes", min=1 << 20, help="For keys and values; not on cuda.")]
_Retain = Annotated[
    int, typer.Option("--retain-bytes", min=0, help="For rows that auditors may ask for, if the pipeline is audited.")
]
_EdgePort = Annotated[int, typer.Option("--edge-port", min=0, max=65535, help="Of TCP edges, for firewalls; 0: any.")]


def register(app: typer.Typer) -> None:
    """The command is part of `app`."""
    app.command("stage")(stage)


def stage(
    listen: _Listen,
    controller: _Controller,
    trust: _Trust,
    store: _Store = Path("~/.llmd/store"),
    state_dir: _StateDir = Path("~/.llmd/stage"),
    layers: _Layers = "",
    device: _Device = "cpu",
    engine: _Engine = "auto",
    threads: _Threads = 1,
    kv_memory_bytes: _KvMemory = 1 << 30,
    retain_bytes: _Retain = 1 << 30,
    edge_port: _EdgePort = 0,
) -> None:
    """Serve layers of a model as a stage of another operator's pipeline, until Ctrl-C.

    Prints its node's public key: the pipeline's operator writes it, and the address, into pipeline.outside (and into
    the registry, if that is signed by hand). The controller says which layers of which model to be and who the
    neighbours are; the model must be signed by a trusted publisher, its blocks come from --store alone, and nothing
    else is done for anybody. Neighbours prove by TLS 1.3 that they have the keys that the controller named.
    """
    # Before torch is imported: its threads would spin while neighbours compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from serve_app.cluster.stage_server import StagePolicy, StageServer
    from serve_app.config import split_address
    from shard_tools.choice import Choice
    from shard_tools.signing import key_text
    from shard_tools.trust_root import read_trust

    async def serve(host: str, door: socket.socket, policy: StagePolicy) -> None:
        server = StageServer(policy, host)
        typer.echo(f"llmd: this stage's node is {key_text(server.key)}; it takes orders at {listen}")
        serving = asyncio.ensure_future(server.serve(door))
        asked = asyncio.Event()
        for what in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(what, asked.set)
        ending = asyncio.ensure_future(asked.wait())
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await server.part()
            serving.cancel()
            await asyncio.wait((serving,))
            typer.echo("llmd: the stage has left its pipeline")
            return
        serving.result()  # raises: it ends by nothing else

    try:
        read_trust(tuple(trust), int(time.time()))  # a mistake in it shows now, not with the first order
        policy = StagePolicy(
            controllers=frozenset(map(_key, controller)),
            publishers=lambda: read_trust(tuple(trust), int(time.time())),
            store=store.expanduser().absolute(),
            state_dir=state_dir.expanduser().absolute(),
            engine=Choice(engine),
            device=device,
            threads=threads,
            kv_memory_bytes=kv_memory_bytes,
            retain_bytes=retain_bytes,
            layers=_span(layers),
            edge_port=edge_port,
        )
        host, port = split_address(listen)
        door = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        asyncio.run(serve(host, door, policy))
    except (LlmdError, OSError, ValueError) as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e


def _key(text: str) -> PublicKey:
    from shard_tools.signing import parse_key, read_public_key

    return parse_key(text) if text.startswith("llmd-ed25519:") else read_public_key(Path(text).expanduser())


def _span(text: str) -> tuple[int, int] | None:
    start, colon, stop = text.partition(":")
    if not text:
        return None
    if colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
        return int(start), int(stop)
    raise InputError(f"--layers {text!r}: expected a:b with a < b")
