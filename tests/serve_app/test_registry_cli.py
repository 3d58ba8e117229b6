"""From a node's key to a registry that a pipeline accepts, as an operator types it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.cluster.enrol import enrol
from serve_app.receipts.identity import Registry
from shard_tools.signing import parse_key, read_public_key


def test_a_signed_registry_is_what_identity_registry_takes(tmp_path: Path) -> None:
    """The node's key, carried by hand, comes back vouched for by an operator whose key the cluster never saw."""
    key = CliRunner().invoke(app, ["registry", "node", "--state-dir", str(tmp_path / "state")]).output.strip()
    out, operator = tmp_path / "registry", tmp_path / "elsewhere" / "operator.key"
    words = ["registry", "sign", "--node", f"gpu-0={key}", "--operator-key", str(operator), "--out", str(out)]
    signed = CliRunner().invoke(app, words)
    assert signed.exit_code == 0, signed.output
    envelope = enrol({parse_key(key): "gpu-0"}, state_dir=tmp_path, operator_key=None, registry=out)
    trusted = read_public_key(tmp_path / "registry.operator.pub")
    assert Registry.open(envelope, trusted, int(time.time())).name_of(parse_key(key)) == "gpu-0"


@pytest.mark.parametrize("node", ["gpu-0", "=x", "gpu-0=llmd-ed25519:12"])
def test_a_node_that_is_no_name_and_key_is_refused(tmp_path: Path, node: str) -> None:
    words = ["registry", "sign", "--node", node, "--operator-key", str(tmp_path / "k"), "--out", str(tmp_path / "r")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert not (tmp_path / "r").exists()
