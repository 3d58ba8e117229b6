"""C++ of this project as libraries for this very processor, made when first asked for and kept for the next start.

Nothing needs them: without a compiler, or if anything here fails, slower code does the same. A library's name says
what it was made from, so a new source, compiler or processor makes a new one. It is code that runs here, so it is
taken only from where nobody but this user (and root) can have put it.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_COMPILERS = ("g++", "c++", "clang++")
# Sums may be reordered, or the compiler could not make vectors of them; infinities and NaNs keep their meaning.
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fPIC",
    "-shared",
    "-pthread",
]
_TIMEOUT_S = 180.0  # about 10 s on a core of 2023


@dataclass(frozen=True, slots=True)
class NativeSource:
    """One source file that becomes a library. without: what happens where it cannot, as a log line says it."""

    path: Path
    without: str


CPU_STEP = NativeSource(
    Path(__file__).parent / "engine" / "cpu" / "native.cpp",
    "decode steps are computed by torch's operators, 2 to 4 times slower",
)
ROW_HASHES = NativeSource(Path(__file__).parent / "receipts" / "rows.cpp", "rows are hashed one by one, in Python")


def native_library(source: NativeSource, folder: Path | None = None) -> Path | None:
    """The library, compiled into folder (None: the user's cache) unless it is there; None if it cannot be made.

    Where that folder cannot be trusted or written, one of this process's own takes its place.
    """
    compiler = next((path for path in map(shutil.which, _COMPILERS) if path is not None), None)
    if compiler is None:
        _log.warning("no C++ compiler here, so %s", source.without)
        return None
    try:
        try:
            return _made(source.path, compiler, (folder or Path.home() / ".cache" / "llmd").absolute())
        except (OSError, RuntimeError) as e:  # RuntimeError: a user without a home
            _log.warning("%s is compiled anew at every start, for it cannot be kept: %s", source.path.name, e)
        private = Path(tempfile.mkdtemp(prefix="llmd-native-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return _made(source.path, compiler, private)
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or b"").decode(errors="replace")[-500:]
        _log.warning("%s could not be made a library, so %s: %s %s", source.path.name, source.without, e, said)
        return None


def load_library(source: NativeSource) -> ctypes.CDLL | None:
    """The library in this process; None, with a log line that says why, if there is none on this machine."""
    path = native_library(source)
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError as e:
        _log.warning("%s cannot be loaded as a library, so %s: %s", source.path.name, source.without, e)
        return None


def _made(source: Path, compiler: str, folder: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=True).stdout
    name = hashlib.sha256(b"\0".join((source.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())))
    library = folder / f"{source.stem}-{name.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_ours(folder, 0o022)
    for above in folder.resolve().parents:
        _require_ours(above, 0 if above.stat().st_mode & stat.S_ISVTX else 0o002)  # sticky: as /tmp is
    if _is_ours(library):  # before the lock: a folder that was filled once may be read-only now
        return library
    with (folder / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the stages of one host start together
        if not _is_ours(library):
            with tempfile.TemporaryDirectory(dir=folder) as part:
                made = Path(part) / library.name
                command = [compiler, *_FLAGS, "-o", str(made), str(source)]
                subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
                made.chmod(0o755)
                os.replace(made, library)
    return library


def _require_ours(folder: Path, writers: int) -> None:
    """Raises PermissionError if it is another's, or one of these bits lets others write."""
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & writers:
        raise PermissionError(
            f"{folder} belongs to user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}: others could have put "
            "code into it that would run here. Set HOME to a folder of your own, or chmod go-w it"
        )


def _is_ours(library: Path) -> bool:
    """Whether it is there, a file that others cannot have written. One that is not is made anew."""
    try:
        found = library.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _processor() -> bytes:
    """What the compiler looks at for -march=native: a home folder may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kept = [line for line in lines if line.startswith(("flags", "model", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(kept))]).encode()
