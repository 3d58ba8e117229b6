"""What the config chooses by name: checked against what is installed here, and made where it is used.

The tables stand beside their seams; this turns their refusals into errors that name the key of the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app.config import AppConfig, ModelConfig
from serve_app.engine.engines import ENGINES
from serve_app.errors import ConfigError
from shard_tools.choice import Choice
from shard_tools.errors import InputError
from shard_tools.index.indexes import INDEXES, open_index
from shard_tools.index.model_index import ModelIndex
from shard_tools.store.block_store import BlockStore
from shard_tools.store.stores import STORES, open_store


def check_choices(app: AppConfig) -> None:
    """Returns if every name that the config chooses is known here. Imports none of them. Raises ConfigError."""
    with _naming("args.model.store"):
        STORES.check(_choice(app.model.store).kind)
    if app.model.index is None and not isinstance(app.model.store, Path):
        raise ConfigError("args.model.index must be given, since model.store is no folder that could hold names")
    with _naming("args.model.index"):
        INDEXES.check(_choice(app.model.index or app.model.store).kind)
    with _naming("args.pipeline.engine"):
        ENGINES.check(app.pipeline.engine.kind)


def store_of(store: Path | Choice) -> BlockStore:
    """The block store of `model.store`. Raises ConfigError."""
    with _naming("args.model.store"):
        return open_store(_choice(store))


def index_of(model: ModelConfig) -> ModelIndex:
    """The index of `model.index`, or the one in the store's folder. Raises ConfigError."""
    with _naming("args.model.index"):
        return open_index(_choice(model.index or model.store))


def store_folder(model: ModelConfig) -> Path:
    """The folder of the store, for commands that know folders only. Raises ConfigError for another kind."""
    if isinstance(model.store, Path):
        return model.store
    raise ConfigError(f"args.model.store is of the kind {model.store.kind!r}, and this command reads folders only")


def _choice(value: Path | Choice) -> Choice:
    return value if isinstance(value, Choice) else Choice.of("directory", path=str(value))


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except InputError as e:
        raise ConfigError(f"{key}: {e}") from e
