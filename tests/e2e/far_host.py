"""A network namespace of its own on this machine, joined to ours by one cable that can be cut. For root alone.

What runs in it reaches nothing but this machine's end of the cable, and is reached by nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


class FarHost:
    """`address` is its own, `here` ours on the same cable."""

    def __init__(self) -> None:
        """Raises OSError where this process may not make one."""
        number = os.getpid() % 16_000
        self.name = f"llmd-{os.getpid()}"
        self._ours, self._theirs = f"lh{number}", f"lf{number}"
        net = f"10.213.{number // 64}.{number % 64 * 4}"
        first = int(net.rpartition(".")[2])
        self.here, self.address = (f"{net.rpartition('.')[0]}.{first + i}" for i in (1, 2))
        if not shutil.which("ip") or not shutil.which("tc"):
            raise OSError("no iproute2 here")
        _remove_those_of_the_dead()
        _do("ip", "netns", "add", self.name)
        try:
            _do("ip", "link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
            _do("ip", "address", "add", f"{self.here}/30", "dev", self._ours)
            _do("ip", "link", "set", self._ours, "up")
            _do("ip", "-n", self.name, "address", "add", f"{self.address}/30", "dev", self._theirs)
            _do("ip", "-n", self.name, "link", "set", self._theirs, "up")
            _do("ip", "-n", self.name, "link", "set", "lo", "up")
        except OSError:
            self.close()
            raise

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command that is to run there."""
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        """Everything that is sent either way is lost, and nobody is told."""
        _do("tc", "qdisc", "replace", "dev", self._ours, "root", "pfifo", "limit", "0")
        _do("tc", "-n", self.name, "qdisc", "replace", "dev", self._theirs, "root", "pfifo", "limit", "0")

    def mend(self) -> None:
        """The cable is whole again."""
        _do("tc", "qdisc", "delete", "dev", self._ours, "root")
        _do("tc", "-n", self.name, "qdisc", "delete", "dev", self._theirs, "root")

    def close(self) -> None:
        """Both ends of the cable go with the namespace."""
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


def _remove_those_of_the_dead() -> None:
    """A test run that was killed leaves its namespace, and nothing else would ever remove it."""
    alive = os.listdir("/proc")  # not by the path of each: that of a thread's number exists too
    for left in Path("/run/netns").glob("llmd-*"):
        if left.name.removeprefix("llmd-") not in alive:
            subprocess.run(["ip", "netns", "delete", left.name], capture_output=True)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
