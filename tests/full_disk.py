"""A disk that is full for a while: a limit on files of this process, or a small file system of its own. For tests."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

_ROOM = 1 << 20  # of the small file system


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: what is written past `size` bytes of a file fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The small file system that `folder` is has no byte left meanwhile."""
    ballast = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        for piece in (4096, 1):
            try:
                while True:
                    os.write(ballast, bytes(piece))
            except OSError:
                continue
        yield
    finally:
        os.close(ballast)
        (folder / "ballast").unlink()


Full = Callable[[], AbstractContextManager[None]]


@contextmanager
def a_disk(kind: str, folder: Path) -> Iterator[tuple[Path, Full]]:
    """A folder, and what makes its disk full. kind: `limit`, or `mounted`, for those who may mount."""
    if kind == "limit":
        yield folder, lambda: files_of_at_most(0)
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder, lambda: filled(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
