"""Tells versions of the application apart: what is configured of it, and its code. And what a new one serves.

Each has a Supervisor and pipelines of its own, beside one another while Serve replaces one by the next. So actors of
different code never speak to each other, and whoever still answers by the old version does so to the end.
"""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import replace
from pathlib import Path

from serve_app.choices import index_of, store_of
from serve_app.config import AppConfig
from serve_app.errors import ConfigError
from shard_tools.catalog import find_model
from shard_tools.index.model_index import ModelRecord
from shard_tools.index.seen import SeenVersions

_PACKAGES = Path(__file__).parents[1], Path(__file__).parents[2] / "shard_tools"
_DIGITS = 10


def version_of(config: AppConfig) -> str:
    """Ten hex digits. What no pipeline looks at makes no difference: how many there are, and what is for ingresses."""
    pipeline = replace(config.pipeline, replicas=1)
    configured = repr((config.model, pipeline, config.audit, config.identity)).encode()
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


def find_record(config: AppConfig) -> ModelRecord:
    """The release that a version which is new here serves. Raises LlmdError."""
    model, seen = config.model, SeenVersions(config.identity.seen)
    store, now_s = store_of(model.store), int(time.time())
    record, _ = find_model(model.name, index_of(model), store, model.publishers(), now_s, seen)
    if model.manifest is not None and model.manifest != str(record.manifest):
        raise ConfigError(
            f"{model.name} leads to {record.manifest}, and the configuration asks for {model.manifest}: "
            f"release that one again, or change args.model.manifest"
        )
    return record
