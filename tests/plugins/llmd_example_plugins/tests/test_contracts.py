"""llm-d's contract suites, as they are, over what this package adds."""

# ruff: noqa: F403  # a suite is taken over whole, and its fixtures are replaced below

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from llmd_example_plugins.sqlite_index import SqliteIndex
from llmd_example_plugins.sqlite_store import SqliteStore

from shard_tools.choice import Choice
from shard_tools.cid import Cid
from tests.contracts.test_block_store import *
from tests.contracts.test_engine import *
from tests.contracts.test_model_index import *

settings.register_profile("plain", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("plain")


@pytest.fixture
def kind() -> Choice:
    return Choice("numpy")


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "models.db")


@pytest.fixture
def damage(tmp_path: Path) -> Callable[[Cid, bytes], None]:
    def damaged(cid: Cid, block: bytes) -> None:
        with sqlite3.connect(tmp_path / "models.db") as connection:
            connection.execute("UPDATE blocks SET block = ? WHERE cid = ?", (block, str(cid)))

    return damaged


@pytest.fixture
def index(tmp_path: Path) -> SqliteIndex:
    return SqliteIndex(tmp_path / "models.db")
