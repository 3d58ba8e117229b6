"""Names lead to implementations of a seam, ours or a package's, or to an error that says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shard_tools.choice import Choice, Table
from shard_tools.cid import Codec
from shard_tools.errors import InputError
from shard_tools.store.block_store import BlockStore
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.stores import open_store

MODULE = """
from shard_tools.errors import NotFoundError
from shard_tools.store.memory import MemoryStore

VALUE = 5

def fine(*, size: int = 1): return MemoryStore()
def needs(*, size: int): return MemoryStore()
def anything(**options): return MemoryStore()
def wants_more(what, /): return MemoryStore()
def shapeless(): return object()
def broken(): raise ZeroDivisionError("no")
def refuses(): raise NotFoundError("the disk", "its bay")

class Half(MemoryStore):
    put = None
"""
NAMES = ("fine", "needs", "anything", "wants_more", "shapeless", "broken", "refuses")
ENTRIES = {name: f"outside_stores:{name}" for name in NAMES} | {
    "half": "outside_stores:Half",
    "value": "outside_stores:VALUE",
    "absent": "outside_stores:nothing",
    "no-module": "outside_stores_that_are_not:x",
    "explodes": "outside_explodes:x",
    "directory": "outside_explodes:x",  # a name of ours
    "doubled": "outside_stores:fine",
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Our stores, and those of two packages as pip leaves them behind."""
    (tmp_path / "outside_stores.py").write_text(MODULE)
    (tmp_path / "outside_explodes.py").write_text("raise RuntimeError('boom')")
    for package, entries in (("one", ENTRIES), ("two", {"doubled": "outside_stores:anything"})):
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[test.stores]", *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_stores", raising=False)
    ours = {"directory": "shard_tools.store.directory:open_directory"}
    return Table("block store", "test.stores", BlockStore, ours)


def test_a_package_s_name_makes_its_implementation_and_nothing_is_imported_before(table: Table) -> None:
    assert {"fine", "directory"} <= set(table.names())
    assert "fine" in table.outside_names() and "directory" not in table.outside_names()
    table.check("fine")
    assert "outside_stores" not in sys.modules
    store = table.make(Choice.of("fine", size=3))
    assert store.get(store.put(Codec.RAW, b"x")) == b"x"
    assert table.make(Choice.of("anything", colour="red"))


def test_a_package_cannot_take_a_name_of_ours(table: Table, tmp_path: Path) -> None:
    assert isinstance(table.make(Choice.of("directory", path=str(tmp_path / "store"))), DirectoryStore)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice("fnie"), "no block store is called 'fnie'; did you mean 'fine'?"),
        (Choice("zzzzzz"), "known here: absent, anything"),
        (Choice("zzzzzz"), "entry point in the group test.stores"),
        (Choice("doubled"), "added by one and two: uninstall all but one"),
        (Choice("absent"), "'absent' (outside_stores:nothing of the package one) cannot be loaded: AttributeError"),
        (Choice("no-module"), "cannot be loaded: ModuleNotFoundError"),
        (Choice("explodes"), "cannot be loaded: RuntimeError: boom"),
        (Choice("value"), "is a int, where a function that makes one is expected"),
        (Choice.of("fine", sise=3), "has no option 'sise'; did you mean 'size'?"),
        (Choice.of("broken", x=1), "has no option 'x'; it takes none"),
        (Choice("needs"), "needs the option 'size'"),
        (Choice("wants_more"), "does not take what this seam gives"),
        (Choice("broken"), "cannot be made: ZeroDivisionError: no"),
        (Choice("shapeless"), "made a object, which has no cids, delete, get, has, label, put"),
        (Choice("half"), "made a Half, which has no put"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_the_reason(table: Table, choice: Choice, said: str) -> None:
    with pytest.raises(InputError) as caught:
        table.make(choice)
    assert said in str(caught.value)


def test_an_error_of_ours_that_a_factory_raises_stays_what_it_is(table: Table) -> None:
    with pytest.raises(Exception, match="the disk is not in its bay"):
        table.make(Choice("refuses"))


def test_a_mistake_of_our_own_stays_what_it_is() -> None:
    """A device without memory is no fault of the config."""
    ours = Table("number", "test.numbers", int, {"nought": "operator:index"})
    with pytest.raises(TypeError, match="interpreted as an integer"):
        ours.make(Choice("nought"), "five")


def test_a_folder_that_is_relative_is_refused() -> None:
    with pytest.raises(InputError, match="'here' is relative"):
        open_store(Choice.of("directory", path="here"))
