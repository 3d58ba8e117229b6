"""A fetch killed at random moments, over and over: nothing corrupt is kept, and nothing kept is fetched again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from shard_tools.block_server import BlockServer
from shard_tools.cid import Cid
from shard_tools.fetch import load_manifest, verify
from shard_tools.index.memory import MemoryIndex
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

ROUNDS = 100
FETCH = """
import sys
from pathlib import Path
from shard_tools.choice import Choice
from shard_tools.cid import Cid
from shard_tools.fetch import fetch
from shard_tools.store.stores import open_store
url, root, manifest = sys.argv[1:]
store = open_store(Choice.of("gateway", cache=root, urls=url))
print("began", flush=True)
fetch(store, store, Cid.parse(manifest))
"""


class Slow(MemoryStore):
    """An origin that remembers what it was asked for and takes its time, so that kills fall into transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[Cid] = Counter()

    def get(self, cid: Cid) -> bytes:
        self.asked[cid] += 1
        threading.Event().wait(0.02)
        return super().get(cid)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fetch_killed_a_hundred_times_keeps_only_right_blocks_and_asks_for_none_twice(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "ck", layers=24)
    origin = Slow()
    record = publish(checkpoint, origin, MemoryIndex(), "tiny", Signer.fresh())
    server = BlockServer(DirectoryStore(tmp_path / "nothing"), "127.0.0.1", 0, None, origin)
    url, draw = f"http://127.0.0.1:{server.port}", random.Random(1)
    kills, finished, target = 0, 0, tmp_path / "target"
    try:
        while kills < ROUNDS:
            held = set(DirectoryStore(target).cids())
            origin.asked.clear()
            command = [sys.executable, "-c", FETCH, url, str(target), str(record.manifest)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
            assert child.stdout is not None and child.stdout.readline() == b"began\n"
            pause = draw.uniform(0, 0.15)
            deadline = time.monotonic() + pause
            while child.poll() is None and time.monotonic() < deadline:
                threading.Event().wait(0.005)
            ended = child.poll()
            child.send_signal(signal.SIGKILL)
            _, said = child.communicate(timeout=30)
            store = DirectoryStore(target)
            for cid in store.cids():
                assert store.get(cid)
            assert not held & origin.asked.keys(), "a block that was kept was fetched again"
            if ended is None:
                kills += 1
                continue
            assert ended == 0, said
            assert verify(store, load_manifest(store, record.manifest)) == []
            finished += 1
            shutil.rmtree(target)
    finally:
        server.close()
    assert finished > 0
