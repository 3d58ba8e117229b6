"""Tells versions of the application apart: what is configured of it, and its code.

Each has a Supervisor and a pipeline of its own, beside one another while Serve replaces one by the next. So actors of
different code never speak to each other, and whoever still answers by the old version does so to the end.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from serve_app.config import AppConfig

_PACKAGES = Path(__file__).parents[1], Path(__file__).parents[2] / "shard_tools"
_DIGITS = 10


def version_of(config: AppConfig) -> str:
    """Ten hex digits. What only ingresses look at makes no difference: their number, their API keys."""
    configured = repr((config.model, config.pipeline, config.audit, config.identity)).encode()
    return hashlib.sha256(hashlib.sha256(configured).digest() + _code()).hexdigest()[:_DIGITS]


@functools.cache
def _code() -> bytes:
    """Of every source file of the two packages, as they lie here: some 2 MB."""
    found = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp")):
            name, text = str(path.relative_to(package)).encode(), path.read_bytes()
            found.update(b"%d %b %d\n" % (len(name), name, len(text)) + text)
    return found.digest()
