"""`llmd`: one program for a model at rest and alive. Each command's own file says what it does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from serve_app import audit_cli, client_cli, receipt_cli, registry_cli, stage_cli
from shard_tools import cli as shard_cli
from shard_tools.errors import LlmdError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
shard_cli.register(app)
client_cli.register(app)
receipt_cli.register(app)
audit_cli.register(app)
registry_cli.register(app)
stage_cli.register(app)


@app.callback()
def _about() -> None:
    """Serve one language model with many machines, and prove what each of them did."""


@app.command("serve")
def serve(
    config: Annotated[Path | None, typer.Argument(help="Serve config file; default: the embedded one.")] = None,
    new_ray: Annotated[
        bool, typer.Option("--new-ray", help="Start a Ray of its own even if one runs on this machine.")
    ] = False,
) -> None:
    """Check the whole config file, then `serve run` it until Ctrl-C."""
    from serve_app.choices import check_choices
    from serve_app.config import config_path  # pydantic: other commands need not wait for it
    from serve_app.serve_file import load_config

    path = config_path(config)
    try:
        file = load_config(path)
        check_choices(file.app)
    except LlmdError as e:
        typer.echo(f"llmd: {e}", err=True)
        raise typer.Exit(2) from e
    typer.echo(f"{file.app.model.name} will answer at {file.url}/v1 once it has generated a first token.")
    environment = {**os.environ, **file.app.environment(), "RAY_USAGE_STATS_ENABLED": "0"}
    address = ["--address", "local"] if new_ray else []
    os.execve(sys.executable, [sys.executable, "-m", "ray.serve.scripts", "run", *address, str(path)], environment)


@app.command("demo")
def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = "What is the capital of France?",
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving until Ctrl-C.")] = False,
) -> None:
    """Publish a small real model, serve it with two stages, ask it a question, and check the receipt."""
    from serve_app.demo import run_demo

    raise typer.Exit(run_demo(question, keep=keep))


@app.command("build-native")
def build_native() -> None:
    """Compile what is C++ for this machine now; else the first stage that starts here does it."""
    from serve_app.native_build import CPU_STEP, ROW_HASHES, native_library

    missing = 0
    for source in (CPU_STEP, ROW_HASHES):
        path = native_library(source)
        missing += path is None
        typer.echo(path or f"llmd: not compiled (see above): {source.without}", err=path is None)
    raise typer.Exit(int(missing > 0))


def main() -> None:
    """The program's entry."""
    app()


if __name__ == "__main__":
    main()
