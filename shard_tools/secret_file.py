"""A secret that is made once and then carried to other machines by hand."""

from __future__ import annotations

import os
from pathlib import Path

from shard_tools.errors import InputError


def create(path: Path, what: str, text: str) -> None:
    """The text is in a new file of mode 0600. what: as errors call it.

    Raises InputError if there is one: a key is never overwritten.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists; a key is never overwritten. Copy it to the other nodes as it is.") from None
    except OSError as e:
        raise InputError(f"cannot write the {what} {path}: {e.strerror}") from e
    try:
        with os.fdopen(fd, "w") as f:
            f.write(text)
    except OSError as e:
        path.unlink()  # half a key would be in the way of a whole one
        raise InputError(f"cannot write the {what} {path}: {e.strerror}. Make room on its disk") from e
