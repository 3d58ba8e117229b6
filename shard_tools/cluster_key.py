"""How the nodes of a cluster know each other's requests: a secret they share, which never travels.

A request carries the time and HMAC-SHA256(secret, what is asked and when), so whoever listens learns no secret, and can
repeat for two minutes only what was asked already. It hides nothing: blocks go over the network as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from shard_tools import secret_file
from shard_tools.errors import InputError

SECRET_BYTES = 32
CLOCK_SKEW_S = 120  # hosts' clocks may differ by this much; the registry of nodes allows 300 for certificates
SCHEME = "LLMD"

_CONTEXT = b"llmd request v1"  # a proof made for anything else is none here


def proof(secret: bytes, method: str, target: str, depth: int, now_s: int) -> str:
    """The Authorization header of a request. depth: how many nodes it has passed already."""
    return f"{SCHEME} {now_s} {_mac(secret, method, target, depth, now_s)}"


def check_proof(secret: bytes, method: str, target: str, depth: int, header: str, now_s: int) -> str | None:
    """None if the header was made with this secret for this request about now; else why not, for the one who asked."""
    scheme, _, rest = header.partition(" ")
    at, _, mac = rest.partition(" ")
    if scheme != SCHEME or not (at.isascii() and at.isdecimal() and len(at) < 16):
        return "no proof of the cluster's key came with the request"
    if not hmac.compare_digest(mac.encode(), _mac(secret, method, target, depth, int(at)).encode()):
        return "the request was made with another cluster key"
    if abs(int(at) - now_s) > CLOCK_SKEW_S:
        return f"the clocks of the two hosts are {abs(int(at) - now_s)} s apart; {CLOCK_SKEW_S} s are accepted"
    return None


def load_key(path: Path) -> bytes:
    """The secret in a file that only its owner may read. Raises InputError otherwise."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_bytes()[:200].decode("ascii", "replace").strip()
    except OSError as e:
        raise InputError(f"cannot read the cluster key {path}: {e.strerror}. Make one: llmd blocks key") from e
    if mode & 0o077:
        raise InputError(f"the cluster key {path} has mode {mode:o}: others may read it. Run: chmod 600 {path}")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise InputError(f"{path} is no cluster key: expected {2 * SECRET_BYTES} hex digits")
    return secret


def create_key(path: Path) -> None:
    """A fresh secret is in a new file of mode 0600. Raises InputError if there is one: a key is never overwritten."""
    secret_file.create(path, "cluster key", secrets.token_hex(SECRET_BYTES) + "\n")


def _mac(secret: bytes, method: str, target: str, depth: int, now_s: int) -> str:
    said = b"\n".join((_CONTEXT, method.encode(), target.encode(), b"%d" % depth, b"%d" % now_s))
    return hmac.new(secret, said, hashlib.sha256).hexdigest()
