"""Which nodes a registry vouches for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serve_app.cluster.enrol import enrol
from serve_app.errors import ConfigError
from serve_app.receipts.identity import RegisteredNode, Registry
from shard_tools import canonical
from shard_tools.signing import Signer, read_public_key

NODE = Signer.from_seed(bytes(32)).public
OTHER = Signer.from_seed(b"\1" * 32).public


def write_registry(path: Path, lifetime_s: int = 3600, issued_ago_s: int = 0) -> None:
    issued = int(time.time()) - issued_ago_s
    registry = Registry.of([RegisteredNode(NODE, "a")], 1, issued, lifetime_s)
    path.write_bytes(canonical.encode(registry.seal(Signer.fresh()).to_value()))


def test_without_a_registry_the_key_in_state_dir_vouches_for_the_nodes_there_are(tmp_path: Path) -> None:
    """The operator's public key is written beside it: that is what clients are told to trust."""
    envelope = enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=None)
    operator = read_public_key(tmp_path / "operator.pub")
    assert Registry.open(envelope, operator, int(time.time())).name_of(NODE) == "a"
    assert (tmp_path / "operator.key").stat().st_mode & 0o777 == 0o600


def test_a_registry_file_is_taken_as_it_is(tmp_path: Path) -> None:
    write_registry(tmp_path / "registry")
    envelope = enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=tmp_path / "registry")
    assert Registry.open(envelope, envelope.key, int(time.time())).name_of(NODE) == "a"
    assert not (tmp_path / "operator.key").exists()


def test_a_node_that_the_registry_does_not_list_is_refused_by_name(tmp_path: Path) -> None:
    write_registry(tmp_path / "registry")
    with pytest.raises(ConfigError, match="does not list the node gpu-7"):
        enrol({OTHER: "gpu-7"}, state_dir=tmp_path, operator_key=None, registry=tmp_path / "registry")


def test_an_expired_registry_is_refused(tmp_path: Path) -> None:
    write_registry(tmp_path / "registry", lifetime_s=60, issued_ago_s=120)
    with pytest.raises(ConfigError, match="expired"):
        enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=tmp_path / "registry")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xa0", bytes(100)])
def test_what_is_no_registry_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "registry"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=path)
