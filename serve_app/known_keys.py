"""Refuses a key that means nothing, and says which known one is nearest."""

from __future__ import annotations

from typing import Any

from serve_app.errors import ConfigError
from serve_app.serve_keys import Keys
from shard_tools.choice import nearest


def refuse_unknown(value: Any, keys: Keys, where: str) -> None:
    """Returns if every key of `value`, at any depth, is one of `keys`. Raises ConfigError otherwise.

    where: how messages call `value`. Lists are looked through. A key that must hold keys and holds neither keys
    nor null is refused too.
    """
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            refuse_unknown(item, keys, f"{where}[{i}]")
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected keys and values, found {str(value)[:100]!r}")
    for key, item in value.items():
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {str(key)[:100]!r}{nearest(str(key), keys)}")
        below = keys[key]
        if below is not None and item is not None:
            refuse_unknown(item, below, f"{where}.{key}")
