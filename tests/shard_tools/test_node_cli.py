"""`llmd node start`: what it sets up and runs. Kubo's program is a stand-in here, for none is to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shard_tools.errors import InputError
from shard_tools.ipfs_daemon import DaemonSettings, configured
from tests.shard_tools.test_cli import Desk, refusal
from tests.shard_tools.test_network_cli import COMMAND

PEER = "/ip4/10.0.0.7/tcp/4001/p2p/12D3KooWKukJjhSXD9QLdVJ4HeonkbZbDXCMYU9oir5R2PyCjJt8"
FAKE = """#!/bin/sh
made='{"Identity": {"PeerID": "12D3"}, "Bootstrap": ["auto"], "Swarm": {"ConnMgr": {}}}'
if [ "$1" = init ]; then echo "$made" > $IPFS_PATH/config
else echo "$@" $LIBP2P_FORCE_PNET; fi
"""


@pytest.fixture
def kubo(tmp_path: Path) -> Path:
    """A program that makes a repository as Kubo does, and says how it was run."""
    path = tmp_path / "ipfs"
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


def test_a_private_swarm_is_set_up_and_the_daemon_run(kubo: Path, tmp_path: Path) -> None:
    desk, key, repo = Desk(tmp_path / "desk"), tmp_path / "swarm.key", tmp_path / "repo"
    assert desk.run("node", "key", "--swarm-key", key).exit_code == 0
    words = ["node", "start", "--binary", kubo, "--repo", repo, "--swarm-key", key, "--peer", PEER, "--api-port", 5009]
    command = [sys.executable, "-c", COMMAND, *map(str, words)]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ, check=True)
        assert "/ip4/127.0.0.1/tcp/5009/http" in run.stdout and "daemon --migrate=true 1" in run.stdout
        config = json.loads((repo / "config").read_text())
        assert config["Bootstrap"] == [] and config["Identity"] == {"PeerID": "12D3"}
        assert config["Addresses"]["API"] == "/ip4/127.0.0.1/tcp/5009"
        assert config["Peering"]["Peers"] == [{"ID": PEER.split("/p2p/")[1], "Addrs": ["/ip4/10.0.0.7/tcp/4001"]}]
        assert not any(config["Swarm"]["Transports"]["Network"].values()) and config["Swarm"]["ConnMgr"] == {}
        assert (repo / "swarm.key").read_text() == key.read_text()
        assert {path.stat().st_mode & 0o077 for path in (repo / "swarm.key", repo / "config", key)} == {0}


def test_the_settings_settle() -> None:
    settings = DaemonSettings(peers=(PEER,))
    once = configured({"Swarm": {"Transports": {"Network": {"QUIC": True}}}}, settings)
    assert configured(once, settings) == once
    with pytest.raises(InputError, match="is no node"):
        DaemonSettings(peers=("10.0.0.7:4001",))


def test_what_is_missing_is_said_with_what_to_do(kubo: Path, tmp_path: Path) -> None:
    desk, key = Desk(tmp_path / "desk"), tmp_path / "swarm.key"
    start = ("node", "start", "--repo", tmp_path / "repo", "--swarm-key", key, "--binary")
    assert "docs.ipfs.tech/install" in refusal(desk.run(*start, "no-such-ipfs"))
    assert "llmd node key" in refusal(desk.run(*start, kubo))
    desk.run("node", "key", "--swarm-key", key)
    assert "never overwritten" in refusal(desk.run("node", "key", "--swarm-key", key))
    key.chmod(0o644)
    assert "chmod 600" in refusal(desk.run(*start, kubo))
    key.chmod(0o600)
    key.write_text("secret")
    assert "is no swarm key" in refusal(desk.run(*start, kubo))
    key.unlink()
    desk.run("node", "key", "--swarm-key", key)
    kubo.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    assert "made no repository" in refusal(desk.run(*start, kubo))
    (tmp_path / "repo" / "config").write_text("{")
    assert "cannot set up" in refusal(desk.run(*start, kubo))
