"""A tiny published model, once for all tests here."""

from __future__ import annotations

import pytest

from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    """Four layers of a Llama with a tied head, float32."""
    store = MemoryStore()
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", layers=4, tied=True)
    return store, split(open_checkpoint(folder), store, "tiny", "float32")
