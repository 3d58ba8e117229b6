"""The commands of a model at rest: shard, publish, fetch, verify, ls, keys.

Exit codes: 0 done, 2 refused (one line on stderr says why), 130 stopped by Ctrl-C. The only file of this package
that reads the environment, and the only one that prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from shard_tools import fetch as fetching
from shard_tools.catalog import open_cid, open_model, open_record
from shard_tools.cid import Cid
from shard_tools.errors import FormatError, InputError, LlmdError
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.progress import Progress
from shard_tools.quantised import Scheme
from shard_tools.signing import PublicKey, Signer, key_text, parse_key, read_public_key
from shard_tools.store.directory import DirectoryStore

HOME = Path("~/.llmd")
PLAIN_EVERY_S = 5.0  # a log gets a line this often

out = Console()
err = Console(stderr=True)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="LLMD_STORE", help="Directory that keeps blocks and names.")
]
KeyOption = Annotated[Path, typer.Option("--key", envvar="LLMD_KEY", help="Private key to sign with; made if absent.")]
TrustOption = Annotated[
    list[str], typer.Option("--trust", help="Publisher's public key, as text or a .pub file. Default: your own.")
]
QuantiseOption = Annotated[str, typer.Option("--quantise", help="none, int8, int4 or fp8.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="keep, float32, bfloat16 or float16.")]
NameOption = Annotated[str, typer.Option("--name", help="The model's name, such as smollm2-135m.")]

STORE = HOME / "store"
KEY = HOME / "keys" / "publisher.pem"
DTYPES = ("keep", "float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    app.command("shard")(shard)
    app.command("publish")(publish)
    app.command("fetch")(fetch)
    app.command("verify")(verify)
    app.command("ls")(ls)
    keys = typer.Typer(no_args_is_help=True, help="The key that signs what you publish.")
    keys.command("new")(keys_new)
    keys.command("show")(keys_show)
    app.add_typer(keys, name="keys")


def shard(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or .gguf file.")],
    name: NameOption,
    store: StoreOption = STORE,
    dtype: DtypeOption = "keep",
    quantise: QuantiseOption = "none",
) -> None:
    """Cut a checkpoint into shards and show their CIDs; nothing is signed or named."""
    with _said():
        from shard_tools.checkpoint.source import open_checkpoint  # torch and transformers: seconds to import
        from shard_tools.checkpoint.split import split

        blocks = DirectoryStore(store.expanduser())
        with _progress() as progress:
            model = split(open_checkpoint(checkpoint), blocks, name, _dtype(dtype), progress, _scheme(quantise))  # type: ignore[arg-type]
        _show(model)
        _line("Not signed, not named: `llmd publish` does both, and keeps these blocks.")


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder, or .gguf file.")],
    name: NameOption,
    store: StoreOption = STORE,
    dtype: DtypeOption = "keep",
    quantise: QuantiseOption = "none",
    key: KeyOption = KEY,
) -> None:
    """Cut a checkpoint into shards, sign the manifest and name it."""
    with _said(resume="Stopped; nothing was named. Run the same command again: it keeps the blocks already written."):
        from shard_tools.publish import publish as publish_model

        root = store.expanduser()
        blocks, index, signer = DirectoryStore(root), DirectoryIndex(root), _signer(key)
        with _progress() as progress:
            record = publish_model(
                checkpoint,
                blocks,
                index,
                name,
                signer,
                _dtype(dtype),  # type: ignore[arg-type]
                progress,
                _scheme(quantise),
            )
        _show(open_record(record, blocks, frozenset([signer.public])))
        _line(f"Published {name}, signed by {key_text(signer.public)}")


def fetch(
    name: Annotated[str, typer.Argument(help="Name of the model at the source.")],
    source: Annotated[Path, typer.Option("--from", help="Directory to fetch from (another store).")],
    store: StoreOption = STORE,
    layers: Annotated[str, typer.Option("--layers", help="Only a stage's layers a:b, half-open.")] = "",
    trust: TrustOption = [],  # noqa: B006  # typer copies it
    key: KeyOption = KEY,
) -> None:
    """Copy a model, every block verified; fetches only what is missing."""
    with _said(resume="Stopped. Run the same command again: it keeps the blocks already fetched."):
        if not (source.expanduser() / "blocks").is_dir():
            raise InputError(f"{source} is no store: it has no blocks/")
        remote, remote_index = DirectoryStore(source.expanduser()), DirectoryIndex(source.expanduser())
        local, index = DirectoryStore(store.expanduser()), DirectoryIndex(store.expanduser())
        model = open_model(name, remote_index, remote, _trusted(trust, key))
        with _progress() as progress:
            span = _layers(layers, model)
            fetching.fetch(remote, local, model.cid, layers=span, progress=progress)
        signature = remote_index.resolve(name).signature
        if span is not None:
            local.put(signature.codec, remote.get(signature))  # a stage opens its part by manifest and signature
            _line(f"Fetched layers {span[0]}:{span[1]} of manifest {model.cid}; a part of a model is not named.")
            return
        record = remote_index.resolve(name)
        if record.manifest != model.cid:
            raise FormatError(f"{name} was published anew while it was fetched; run the same command again")
        local.put(record.signature.codec, remote.get(record.signature))
        index.publish(name, record, local.has)
        _line(f"Fetched {name} {model.cid}")


def verify(
    model: Annotated[str, typer.Argument(help="Name, or CID of a manifest.")],
    store: StoreOption = STORE,
    trust: TrustOption = [],  # noqa: B006  # typer copies it
    key: KeyOption = KEY,
) -> None:
    """Check the publisher's signature (of a name) and hash every block of a model."""
    with _said():
        root = store.expanduser()
        blocks = DirectoryStore(root)
        try:
            found = open_cid(Cid.parse(model), blocks)
            signed = "not checked: a CID vouches for itself"
        except FormatError:
            found = open_model(model, DirectoryIndex(root), blocks, _trusted(trust, key))
            signed = "by a trusted publisher"
        with _progress() as progress:
            bad = fetching.verify(blocks, found, progress)
        for block in bad:
            err.print(f"{block.where}: {block.error}", soft_wrap=True, markup=False, highlight=False)
        if bad:
            raise typer.Exit(2)
        size = sum(shard.size for shard in found.shards)
        _line(f"Whole: {found.name} {found.cid}, {size / 1e6:.1f} MB; signature: {signed}")


def ls(store: StoreOption = STORE) -> None:
    """List the models that a store names."""
    with _said():
        root = store.expanduser()
        blocks, index = DirectoryStore(root), DirectoryIndex(root)
        for name in index.names():
            try:
                model = open_cid(index.resolve(name).manifest, blocks)
            except LlmdError as e:
                _line(f"{name:<24} broken: {e}")
                continue
            size = sum(shard.size for shard in model.shards) / 1e6
            said = f"{model.n_layers:>3} layers {model.dtype:<8} {size:>9.1f} MB  {model.license:<12} {model.cid}"
            _line(f"{name:<24} {said}")
        if not index.names():
            _line(f"No model is named in {root}; `llmd publish` names one.")


def keys_new(key: KeyOption = KEY) -> None:
    """Make a key, unless there is one."""
    with _said():
        if key.expanduser().exists():
            raise InputError(f"{key} exists; a key is never overwritten. See: llmd keys show")
        _line(key_text(_signer(key).public))


def keys_show(key: KeyOption = KEY) -> None:
    """Print the public key that others need in order to trust what you publish."""
    with _said():
        _line(key_text(Signer.load(key.expanduser()).public))


def _show(model: Manifest) -> None:
    for unit in model.units:
        label = f"layer {unit.start}" if unit.kind == "layer" else unit.kind
        size = sum(model.tensor(ref).size for ref in unit.tensors) / 1e6
        own = [str(model.shards[i].cid) for i in sorted({ref.shard for ref in unit.tensors})]
        _line(f"{label:<10} {len(unit.tensors):>3} tensors {size:>9.1f} MB  {' + '.join(own)}")
    _line(f"manifest {model.cid} ({model.model_type}, {model.n_layers} layers, {model.dtype})")


def _line(text: str) -> None:
    """One line on stdout, never wrapped or cut: CIDs are there to be copied."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise InputError(f"--dtype {text!r} is unknown: choose one of {', '.join(DTYPES)}")
    return text


def _scheme(text: str) -> Scheme | None:
    known: dict[str, Scheme | None] = {"none": None, "int8": "int8", "int4": "int4", "fp8": "fp8"}
    if text not in known:
        raise InputError(f"--quantise {text!r} is unknown: choose one of {', '.join(known)}")
    return known[text]


def _layers(text: str, model: Manifest) -> tuple[int, int] | None:
    if not text:
        return None
    start, colon, stop = text.partition(":")
    if colon and start.isdecimal() and stop.isdecimal() and 0 <= int(start) < int(stop) <= model.n_layers:
        return int(start), int(stop)
    raise InputError(f"--layers {text!r}: expected a:b with 0 <= a < b <= {model.n_layers}")


def _signer(key: Path) -> Signer:
    """The signer at `key`, made if absent, with its public half beside it."""
    path = key.expanduser()
    signer = Signer.load_or_create(path)
    public = path.with_suffix(".pub")
    if not public.exists():
        public.write_text(key_text(signer.public) + "\n")
    return signer


def _trusted(given: list[str], key: Path) -> frozenset[PublicKey]:
    if given:
        return frozenset(read_public_key(Path(item)) if Path(item).is_file() else parse_key(item) for item in given)
    if not key.expanduser().exists():
        raise InputError("no publisher is trusted: pass --trust with the public key of whoever published the model")
    return frozenset([Signer.load(key.expanduser()).public])


@contextmanager
def _said(resume: str = "Stopped.") -> Iterator[None]:
    """Errors of ours become one line on stderr and exit code 2; Ctrl-C becomes `resume` and 130."""
    try:
        yield
    except LlmdError as e:
        err.print(f"llmd: {e}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from e
    except KeyboardInterrupt as e:
        err.print(resume, soft_wrap=True)
        raise typer.Exit(130) from e


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar in a terminal, a line now and then elsewhere; on stderr, so that stdout stays for results."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _plain() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def say(label: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S or (done == total and total):
            last = now
            err.print(f"{label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", highlight=False)

    return say
