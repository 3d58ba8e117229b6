"""The compiled step as a library for this very processor, made when it is first asked for and kept for the next start.

Nothing needs it: without a compiler, or if anything here fails, the same steps are computed by torch's operators.
The library's name says what it was made from, so a new source, compiler or processor makes a new one. It is code that
runs here, so it is taken only from where nobody but this user (and root) can have put it.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.cpp")
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


def native_library(folder: Path | None = None) -> Path | None:
    """The library, compiled into folder (None: the user's cache) unless it is there; None if it cannot be made.

    Where that folder cannot be trusted or written, one of this process's own takes its place.
    """
    compiler = next((path for path in map(shutil.which, _COMPILERS) if path is not None), None)
    if compiler is None:
        _log.warning("no C++ compiler here, so decode steps are computed by torch's operators, 2 to 4 times slower")
        return None
    try:
        try:
            return _made(compiler, (folder or Path.home() / ".cache" / "llmd").absolute())
        except (OSError, RuntimeError) as e:  # RuntimeError: a user without a home
            _log.warning("the compiled step cannot be kept, so it is made anew at every start: %s", e)
        private = Path(tempfile.mkdtemp(prefix="llmd-step-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return _made(compiler, private)
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or b"").decode(errors="replace")[-500:]
        _log.warning(
            "the compiled step could not be made, so torch's operators serve, 2 to 4 times slower: %s %s", e, said
        )
        return None


def _made(compiler: str, folder: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=True).stdout
    name = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())))
    library = folder / f"step-{name.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_ours(folder, 0o022)
    for above in folder.resolve().parents:
        _require_ours(above, 0 if above.stat().st_mode & stat.S_ISVTX else 0o002)  # sticky: as /tmp is
    if _is_ours(library):  # before the lock: a folder that was filled once may be read-only now
        return library
    with (folder / "step.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the stages of one host start together
        if not _is_ours(library):
            with tempfile.TemporaryDirectory(dir=folder) as part:
                made = Path(part) / library.name
                command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
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
