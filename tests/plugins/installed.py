"""The example package installed by pip into a folder of its own: offline, from its source, as a user would have it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("llmd_example_plugins")


def install(folder: Path) -> Path:
    """Returns the folder to put on the path. The source is copied first, because a build writes beside it."""
    source, target = folder / "source", folder / "site"
    shutil.copytree(SOURCE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return target


def environment(site: Path) -> dict[str, str]:
    """Of a process that has the package and this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
