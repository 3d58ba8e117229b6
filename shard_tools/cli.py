"""The commands of a model at rest: shard, publish, fetch, verify, ls, keys; others stand beside them.

The environment is read by the options of console.py alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from shard_tools import bundle_cli, car_cli, fetch_cli, keep_cli, network_cli, node_cli, trust_cli
from shard_tools import fetch as fetching
from shard_tools.catalog import open_cid, open_model, open_record
from shard_tools.cid import Cid
from shard_tools.console import (
    KEY,
    STORE,
    KeyOption,
    StoreOption,
    TrustOption,
    err,
    line,
    progress_bar,
    refusals,
    signer_at,
    trusted_keys,
)
from shard_tools.errors import FormatError, InputError, LlmdError
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.seen import SeenVersions
from shard_tools.keeping import Pins, filling
from shard_tools.manifest import Manifest
from shard_tools.naming import cosign as cosign_model
from shard_tools.naming import sign_and_name
from shard_tools.openssf import check_folder
from shard_tools.quantised import Scheme
from shard_tools.ranges import RangeMaps
from shard_tools.signing import Signer, key_text
from shard_tools.store.directory import DirectoryStore
from shard_tools.trust import TrustPolicy

QuantiseOption = Annotated[str, typer.Option("--quantise", help="none, int8, int4 or fp8.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="keep, float32, bfloat16 or float16.")]
DaysOption = Annotated[int, typer.Option("--valid-days", min=1, max=3650, help="Days until it must be signed anew.")]
NameOption = Annotated[str, typer.Option("--name", help="The model's name, such as smollm2-135m.")]

DAY_S = 86400
DTYPES = ("keep", "float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("shard")(shard)
    app.command("publish")(publish)
    app.command("cosign")(cosign)
    app.command("renew")(renew)
    fetch_cli.register(app)
    app.command("verify")(verify)
    app.command("ls")(ls)
    keys = typer.Typer(no_args_is_help=True, help="The key that signs what you publish.")
    keys.command("new")(keys_new)
    keys.command("show")(keys_show)
    app.add_typer(keys, name="keys")
    bundle_cli.register(app)
    car_cli.register(app)
    trust_cli.register(app)
    network_cli.register(app)
    keep_cli.register(app)
    node_cli.register(app)


def shard(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or .gguf file.")],
    name: NameOption,
    store: StoreOption = STORE,
    dtype: DtypeOption = "keep",
    quantise: QuantiseOption = "none",
) -> None:
    """Cut a checkpoint into shards and show their CIDs; nothing is signed or named."""
    with refusals():
        from shard_tools.checkpoint.original import original_ranges
        from shard_tools.checkpoint.source import open_checkpoint  # torch and transformers: seconds to import
        from shard_tools.checkpoint.split import split

        blocks = DirectoryStore(store.expanduser())
        with filling(store.expanduser()), progress_bar() as progress:
            opened = open_checkpoint(checkpoint)
            model = split(opened, blocks, name, _dtype(dtype), progress, _scheme(quantise))  # type: ignore[arg-type]
        found = original_ranges(opened, model)
        if found is not None:
            RangeMaps(store.expanduser()).put(found)
        _show(model)
        _show_ranges(store.expanduser(), model.cid)
        line("Not signed, not named: `llmd publish` does both, and keeps these blocks.")


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or .gguf file.")],
    name: NameOption,
    store: StoreOption = STORE,
    dtype: DtypeOption = "keep",
    quantise: QuantiseOption = "none",
    key: KeyOption = KEY,
    valid_days: DaysOption = 365,
    bundle: Annotated[
        Path | None, typer.Option("--model-signing-bundle", help="OpenSSF signature over the folder, checked first.")
    ] = None,
    bundle_key: Annotated[
        Path | None, typer.Option("--model-signing-key", help="The public EC key that made it, as PEM.")
    ] = None,
) -> None:
    """Cut a checkpoint into shards, sign the manifest and name it."""
    with refusals(
        resume="Stopped; nothing was named. Run the same command again: it keeps the blocks already written."
    ):
        from shard_tools.publish import publish as publish_model

        root = store.expanduser()
        blocks, index, signer = DirectoryStore(root), DirectoryIndex(root), signer_at(key)
        with filling(root), progress_bar() as progress:
            record = publish_model(
                checkpoint,
                blocks,
                index,
                name,
                signer,
                _dtype(dtype),  # type: ignore[arg-type]
                progress,
                _scheme(quantise),
                valid_days * DAY_S,
                RangeMaps(root),
                _signed_check(checkpoint, bundle, bundle_key),
            )
        _show(open_record(record, blocks, TrustPolicy.any_of([signer.public])))
        _show_ranges(root, record.manifest)
        line(f"Published {name}, signed by {key_text(signer.public)}")


def cosign(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    store: StoreOption = STORE,
    key: KeyOption = KEY,
) -> None:
    """Sign what a name means with one more key, where a policy asks for several. Look at the model first."""
    with refusals():
        root, signer = store.expanduser(), signer_at(key)
        with filling(root):
            record = cosign_model(name, DirectoryStore(root), DirectoryIndex(root), signer)
        line(f"Signed {name} {record.manifest} also by {key_text(signer.public)}")


def renew(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    store: StoreOption = STORE,
    key: KeyOption = KEY,
    valid_days: DaysOption = 365,
) -> None:
    """Sign what a name means anew, for a longer time and as a newer release. Other signers sign again too."""
    with refusals():
        root, signer = store.expanduser(), signer_at(key)
        blocks, index = DirectoryStore(root), DirectoryIndex(root)
        model = open_record(index.resolve(name), blocks, TrustPolicy.any_of([signer.public]))
        with filling(root):
            sign_and_name(model, blocks, index, signer, int(time.time()), valid_days * DAY_S)
        line(f"Signed {name} {model.cid} anew, for {valid_days} days")


def verify(
    model: Annotated[str, typer.Argument(help="Name, or CID of a manifest.")],
    store: StoreOption = STORE,
    trust: TrustOption = [],  # noqa: B006  # typer copies it
    key: KeyOption = KEY,
) -> None:
    """Check the publisher's signature (of a name) and hash every block of a model."""
    with refusals():
        root = store.expanduser()
        blocks = DirectoryStore(root)
        try:
            found = open_cid(Cid.parse(model), blocks)
            signed = "not checked: a CID vouches for itself"
        except FormatError:
            policy, seen = trusted_keys(trust, key), SeenVersions(root / "seen")
            found = open_model(model, DirectoryIndex(root), blocks, policy, int(time.time()), seen)
            signed = "by a trusted publisher"
        with progress_bar() as progress:
            bad = fetching.verify(blocks, found, progress)
        for block in bad:
            err.print(f"{block.where}: {block.error}", soft_wrap=True, markup=False, highlight=False)
        if bad:
            raise typer.Exit(2)
        size = sum(shard.size for shard in found.shards)
        line(f"Whole: {found.name} {found.cid}, {size / 1e6:.1f} MB; signature: {signed}")


def ls(store: StoreOption = STORE) -> None:
    """List the models that a store names, and its pins."""
    with refusals():
        root = store.expanduser()
        blocks, index = DirectoryStore(root), DirectoryIndex(root)
        for name in index.names():
            try:
                model = open_cid(index.resolve(name).manifest, blocks)
            except LlmdError as e:
                line(f"{name:<24} broken: {e}")
                continue
            size = sum(shard.size for shard in model.shards) / 1e6
            said = f"{model.n_layers:>3} layers {model.dtype:<8} {size:>9.1f} MB  {model.license:<12} {model.cid}"
            line(f"{name:<24} {said}")
        pinned = Pins(root).all()
        for cid in pinned:
            line(f"{'pinned':<24} {cid}")
        if not index.names() and not pinned:
            line(f"No model is named in {root}; `llmd publish` names one.")


def keys_new(key: KeyOption = KEY) -> None:
    """Make a key, unless there is one."""
    with refusals():
        if key.expanduser().exists():
            raise InputError(f"{key} exists; a key is never overwritten. See: llmd keys show")
        line(key_text(signer_at(key).public))


def keys_show(key: KeyOption = KEY) -> None:
    """Print the public key that others need in order to trust what you publish."""
    with refusals():
        line(key_text(Signer.load(key.expanduser()).public))


def _show(model: Manifest) -> None:
    for unit in model.units:
        label = f"layer {unit.start}" if unit.kind == "layer" else unit.kind
        size = sum(model.tensor(ref).size for ref in unit.tensors) / 1e6
        own = [str(model.shards[i].cid) for i in sorted({ref.shard for ref in unit.tensors})]
        line(f"{label:<10} {len(unit.tensors):>3} tensors {size:>9.1f} MB  {' + '.join(own)}")
    line(f"manifest {model.cid} ({model.model_type}, {model.n_layers} layers, {model.dtype})")


def _signed_check(folder: Path, bundle: Path | None, key: Path | None) -> Callable[[Sequence[str]], None] | None:
    if bundle is None and key is None:
        return None
    if bundle is None or key is None:
        raise InputError(
            "a signature is checked with its key: give both --model-signing-bundle and --model-signing-key"
        )

    def check(parts: Sequence[str]) -> None:
        check_folder(folder, bundle, key.expanduser(), parts)
        line(f"Every file of {folder} is as the owner of {key} signed it")

    return check


def _show_ranges(root: Path, manifest: Cid) -> None:
    path = RangeMaps(root).path_of(manifest)
    if path.exists():
        line(f"Its weights can be had from wherever these files are: llmd fetch ... --hub ADDRESS --ranges {path}")


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise InputError(f"--dtype {text!r} is unknown: choose one of {', '.join(DTYPES)}")
    return text


def _scheme(text: str) -> Scheme | None:
    known: dict[str, Scheme | None] = {"none": None, "int8": "int8", "int4": "int4", "fp8": "fp8"}
    if text not in known:
        raise InputError(f"--quantise {text!r} is unknown: choose one of {', '.join(known)}")
    return known[text]
