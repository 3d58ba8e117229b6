"""One result of one benchmark: a JSON line that says what was measured, where, by which command, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Result:
    """figures: name -> value; a name ends with its unit."""

    benchmark: str
    figures: dict[str, Any]
    machine: str = field(default_factory=lambda: machine())
    commit: str = field(default_factory=lambda: commit())
    command: str = field(default_factory=lambda: " ".join(["python", *sys.orig_argv[1:]]))  # argv[0] would be a path
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def save(result: Result, folder: Path | None = None) -> Path:
    """Append the result to its benchmark's file, and print it."""
    path = (folder or RESULTS) / f"{result.benchmark}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(asdict(result), sort_keys=True) + "\n")
    for name, value in result.figures.items():
        print(f"  {name}: {value}")
    return path


def machine() -> str:
    """Processor, cores and GPU of this machine."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gpu = ""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = ", " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    return f"{os.cpu_count()} x {model}{gpu}"


def commit() -> str:
    """The commit of this checkout, with a + if it has changes of its own."""
    try:
        changed = _git("status", "--porcelain", "-uno")
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
