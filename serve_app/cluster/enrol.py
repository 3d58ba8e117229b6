"""Which nodes the operator answers for: the registry that every receipt carries.

An operator who keeps their key off the cluster signs a registry by hand and names its file in the config; then a
node that is not in it is refused. Without one, as on a single machine, the operator's key lies in state_dir and
vouches for whatever nodes run a stage; the README says what that is worth.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from serve_app.errors import ConfigError
from serve_app.receipts.identity import RegisteredNode, Registry
from shard_tools import canonical
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope, PublicKey, Signer, key_text

_MAX_REGISTRY_BYTES = 1 << 20
_LIFETIME_S = 30 * 86_400  # a month: a node that left is vouched for no longer than that
OPERATOR_PUBLIC = "operator.pub"


def enrol(
    nodes: Mapping[PublicKey, str], *, state_dir: Path, operator_key: Path | None, registry: Path | None
) -> Envelope:
    """The signed registry that holds all these nodes (key -> host name).

    Raises ConfigError if the registry file lacks one of them, has expired, or cannot be read; InputError, ConfigError
    if there is no operator's key and none can be made.
    """
    if registry is not None:
        return _from_file(registry, nodes)
    operator = Signer.load_or_create(operator_key or state_dir / "operator.key")
    _show(operator.public, state_dir / OPERATOR_PUBLIC)
    now_s = int(time.time())
    members = [RegisteredNode(key, name) for key, name in nodes.items()]
    return Registry.of(members, now_s, now_s, _LIFETIME_S).seal(operator)


def _show(operator: PublicKey, path: Path) -> None:
    """Clients find the key in this file. It is written once: no repair depends on a disk that has room."""
    text = key_text(operator) + "\n"
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and path.read_text() == text:
            return
        fresh.write_text(text)
        fresh.replace(path)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        with suppress(OSError):
            fresh.unlink()
        raise ConfigError(f"identity.state_dir: cannot write {path}: {why}. Make room there, or name another") from e


def _from_file(path: Path, nodes: Mapping[PublicKey, str]) -> Envelope:
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_REGISTRY_BYTES + 1)
        value = canonical.decode(data, max_bytes=_MAX_REGISTRY_BYTES)
        envelope = Envelope.from_value(value, "registry", _MAX_REGISTRY_BYTES)
        listed = Registry.open(envelope, envelope.key, int(time.time()))
    except OSError as e:
        raise ConfigError(f"identity.registry: cannot read {path}: {e.strerror}") from e
    except LlmdError as e:
        raise ConfigError(f"identity.registry: {path}: {e}") from e
    for key, name in nodes.items():
        if listed.name_of(key) is None:
            raise ConfigError(
                f"identity.registry: {path} does not list the node {name} ({key_text(key)}). "
                f"Have the operator sign a registry that does, or keep stages off that node."
            )
    return envelope
