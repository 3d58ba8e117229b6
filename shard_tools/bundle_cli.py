"""`llmd export` and `llmd bundle`: a model as a plain folder, and signatures of OpenSSF Model Signing over one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shard_tools.catalog import open_cid
from shard_tools.cid import Cid
from shard_tools.console import STORE, StoreOption, line, progress_bar, refusals
from shard_tools.errors import FormatError
from shard_tools.folder import write_folder
from shard_tools.index.directory import DirectoryIndex
from shard_tools.openssf import check_folder, sign_folder
from shard_tools.store.directory import DirectoryStore

FolderArgument = Annotated[Path, typer.Argument(help="The model's folder.")]
BundleOption = Annotated[Path, typer.Option("--bundle", help="The signature's file.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("export")(export)
    bundle = typer.Typer(no_args_is_help=True, help="OpenSSF Model Signing: signatures over a model's folder.")
    bundle.command("sign")(bundle_sign)
    bundle.command("verify")(bundle_verify)
    app.add_typer(bundle, name="bundle")


def export(
    model: Annotated[str, typer.Argument(help="Name of the model, or CID of its manifest.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    store: StoreOption = STORE,
) -> None:
    """Write a model as a Hugging Face folder that other tools read, every block hashed."""
    with refusals():
        root = store.expanduser()
        try:
            cid = Cid.parse(model)
        except FormatError:
            cid = DirectoryIndex(root).resolve(model).manifest
        blocks = DirectoryStore(root)
        with progress_bar() as progress:
            write_folder(blocks, open_cid(cid, blocks), folder, progress)
        line(f"Wrote {folder}, of manifest {cid}")


def bundle_sign(
    folder: FolderArgument,
    bundle: BundleOption,
    key: Annotated[Path, typer.Option("--private-key", help="EC key (P-256, P-384, P-521) as PEM.")],
) -> None:
    """Sign every file of a folder; anybody's model_signing checks it."""
    with refusals():
        sign_folder(folder, key.expanduser(), bundle)
        line(f"Signed {folder}: {bundle}")


def bundle_verify(
    folder: FolderArgument,
    bundle: BundleOption,
    key: Annotated[Path, typer.Option("--public-key", help="The signer's public EC key as PEM.")],
) -> None:
    """Check that a folder's files are those that were signed."""
    with refusals():
        check_folder(folder, bundle, key.expanduser())
        line(f"Signed: every file of {folder}, by {key}")
