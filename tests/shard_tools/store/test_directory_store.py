"""What a directory of blocks keeps beyond the laws of every store: through kills, torn files and other users."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from shard_tools.cid import Codec
from shard_tools.store.directory import DirectoryStore


def test_a_torn_block_is_healed_by_putting_it_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    cid = store.put(Codec.RAW, b"whole")
    next(tmp_path.rglob(str(cid))).write_bytes(b"who")
    assert store.put(Codec.RAW, b"whole") == cid
    assert store.get(cid) == b"whole"


def _write_forever(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    store = DirectoryStore(root)
    for i in range(1 << 30):
        store.put(Codec.RAW, os.urandom(8) * 50_000)
        if i == 20:
            ready.set()


def test_a_writer_killed_at_any_moment_leaves_whole_blocks_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=_write_forever, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(30) and writer.pid
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    store = DirectoryStore(tmp_path)
    held = list(store.cids())
    assert len(held) > 20
    for cid in held:
        assert len(store.get(cid)) == 400_000


def test_blocks_of_a_directory_are_readable_by_others(tmp_path: Path) -> None:
    cid = DirectoryStore(tmp_path).put(Codec.RAW, b"x")
    assert next(tmp_path.rglob(str(cid))).stat().st_mode & 0o777 == 0o644


def test_abandoned_temporary_files_are_forgotten_and_fresh_ones_kept(tmp_path: Path) -> None:
    DirectoryStore(tmp_path)
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    DirectoryStore(tmp_path)
    assert not old.exists() and new.exists()
