"""What the commands of this package share: options, what they print, and how they refuse.

Exit codes: 0 done, 2 refused (one line on stderr says why), 130 stopped by Ctrl-C.
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

from shard_tools.errors import InputError, LlmdError
from shard_tools.progress import Progress
from shard_tools.signing import Signer, key_text
from shard_tools.trust import TrustPolicy
from shard_tools.trust_root import read_trust

HOME = Path("~/.llmd")
STORE = HOME / "store"
KEY = HOME / "keys" / "publisher.pem"
PLAIN_EVERY_S = 5.0  # a log gets a line this often

out = Console()
err = Console(stderr=True)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="LLMD_STORE", help="Directory that keeps blocks and names.")
]
KeyOption = Annotated[Path, typer.Option("--key", envvar="LLMD_KEY", help="Private key to sign with; made if absent.")]
TrustOption = Annotated[
    list[str],
    typer.Option(
        "--trust", help="A publisher's public key, as text or a .pub file, or a trust root. Default: your own."
    ),
]


def line(text: str) -> None:
    """One line on stdout, never wrapped or cut: CIDs are there to be copied."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def signer_at(key: Path) -> Signer:
    """The signer at `key`, made if absent, with its public half beside it."""
    path = key.expanduser()
    signer = Signer.load_or_create(path)
    public = path.with_suffix(".pub")
    if not public.exists():
        public.write_text(key_text(signer.public) + "\n")
    return signer


def trusted_keys(given: list[str], key: Path) -> TrustPolicy:
    """What --trust says, or else that the person's own key counts. Raises InputError if there is neither."""
    if given:
        return read_trust(given, int(time.time()))
    if not key.expanduser().exists():
        raise InputError("no publisher is trusted: pass --trust with the public key of whoever published the model")
    return TrustPolicy.any_of([Signer.load(key.expanduser()).public])


@contextmanager
def refusals(resume: str = "Stopped.") -> Iterator[None]:
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
def progress_bar() -> Iterator[Progress]:
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
