"""`llmd car`: a model as one file, out and in."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.archive import Imported, export_model, import_model
from shard_tools.catalog import accept_record
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
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.seen import SeenVersions
from shard_tools.keeping import Pins, filling
from shard_tools.store.directory import DirectoryStore

FileArgument = Annotated[Path, typer.Argument(help="The CAR file.")]


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    car = typer.Typer(no_args_is_help=True, help="A model as one CAR file, which IPFS tools read too.")
    car.command("export")(car_export)
    car.command("import")(car_import)
    app.add_typer(car, name="car")


def car_export(
    model: Annotated[str, typer.Argument(help="Name, or CID of a manifest.")],
    file: FileArgument,
    store: StoreOption = STORE,
) -> None:
    """Write every block of a model, and its signature if it is named, into one file."""
    with refusals(resume="Stopped; no file was left."):
        root = store.expanduser()
        blocks = DirectoryStore(root)
        try:
            manifest, signature = Cid.parse(model), None
        except FormatError:
            record = DirectoryIndex(root).resolve(model)
            manifest, signature = record.manifest, record.signature
        part = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with part.open("wb") as out, progress_bar() as progress:
                size = export_model(blocks, manifest, signature, out, progress)
            part.replace(file)
        except OSError as e:
            raise InputError(f"cannot write {file}: {e.strerror}") from e
        finally:
            with suppress(OSError):
                part.unlink()  # is there only if the file is not whole
        line(f"Wrote {file}, {size / 1e6:.1f} MB, of manifest {manifest}")


def car_import(
    file: FileArgument,
    store: StoreOption = STORE,
    trust: TrustOption = [],  # noqa: B006  # typer copies it
    key: KeyOption = KEY,
) -> None:
    """Keep the model of a CAR file, every block hashed; it gets its name if a trusted publisher signed it."""
    with refusals(resume="Stopped; nothing was named. Run the same command again: it keeps the blocks already read."):
        root = store.expanduser()
        blocks = DirectoryStore(root)
        try:
            with file.open("rb", buffering=1 << 20) as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise InputError(f"{file} is no regular file")
                with filling(root):
                    found = import_model(stream, str(file), blocks)
                    _name(found, file, root, blocks, trust, key)
        except OSError as e:
            raise InputError(f"cannot read {file}: {e.strerror}") from e


def _name(found: Imported, file: Path, root: Path, blocks: DirectoryStore, trust: list[str], key: Path) -> None:
    """The imported model has its name, if a trusted publisher signed it; without a signature it is pinned."""
    if found.record is None:
        Pins(root).add(found.model.cid)
        line(f"Imported manifest {found.model.cid}; the file has no signature, so it is pinned, and not named.")
        return
    policy, seen = trusted_keys(trust, key), SeenVersions(root / "seen")
    accept_record(found.record, str(file), blocks, policy, int(time.time()), seen)
    DirectoryIndex(root).publish(found.model.name, found.record, blocks.has)
    line(f"Imported {found.model.name} {found.model.cid}")
