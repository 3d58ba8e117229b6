"""A compiled library is code: it is taken only from where nobody else can have put it, and its absence ends nothing."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from serve_app.native_build import NativeSource, native_library


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_library_is_made_once_and_again_for_another_source(tmp_path: Path) -> None:
    source = NativeSource(tmp_path / "one.cpp", "all is slow")
    source.path.write_text('extern "C" int one() { return 1; }')
    first = native_library(source, tmp_path / "cache")
    assert first is not None and first == native_library(source, tmp_path / "cache")
    source.path.write_text('extern "C" int one() { return 2; }')
    other = native_library(source, tmp_path / "cache")
    assert other is not None and other != first and first.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_the_compiler_refuses_is_said_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = NativeSource(tmp_path / "broken.cpp", "all is slow")
    broken.path.write_text("this is no program")
    assert native_library(broken, tmp_path / "cache") is None
    assert (
        "could not be made" in caplog.text
        and "all is slow" in caplog.text
        and not list((tmp_path / "cache").glob("*.so"))
    )


def test_without_a_compiler_there_is_none_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_library(NativeSource(tmp_path / "no.cpp", "all is slow"), tmp_path) is None
    assert "no C++ compiler" in caplog.text


@pytest.fixture
def source(tmp_path: Path) -> NativeSource:
    """One that compiles at once."""
    path = tmp_path / "answer.cpp"
    path.write_text("int answer() { return 42; }")
    return NativeSource(path, "all is slow")


@pytest.fixture
def built(source: NativeSource, tmp_path: Path) -> Path:
    """Its library in a folder of its own."""
    library = native_library(source, tmp_path / "cache")
    if library is None:
        pytest.skip("no C++ compiler")
    return library


def test_it_is_made_once_and_nobody_else_may_write_it(source: NativeSource, built: Path) -> None:
    made = built.stat()
    assert native_library(source, built.parent) == built and built.stat().st_mtime_ns == made.st_mtime_ns
    assert not (made.st_mode | built.parent.stat().st_mode) & 0o022


def test_a_library_that_others_could_have_written_is_made_anew(source: NativeSource, built: Path) -> None:
    built.write_bytes(b"hostile")
    built.chmod(0o777)
    assert native_library(source, built.parent) == built
    assert built.read_bytes().startswith(b"\x7fELF") and not built.stat().st_mode & 0o022


def test_a_link_to_a_library_elsewhere_is_not_followed(source: NativeSource, built: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "hostile.so"
    elsewhere.write_bytes(b"hostile")
    built.unlink()
    built.symlink_to(elsewhere)
    assert native_library(source, built.parent) == built and not built.is_symlink()
    assert elsewhere.read_bytes() == b"hostile"


@pytest.mark.parametrize("above", [False, True], ids=["the folder", "one above it"])
def test_nothing_is_taken_from_a_folder_that_others_can_write(
    source: NativeSource, built: Path, above: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = built.parent.parent if above else built.parent
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        library = native_library(source, built.parent)
    assert library is not None and built.parent not in library.parents and library.exists()
    assert str(folder) in caplog.text and "chmod" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "library"])
def test_nothing_that_belongs_to_another_user_is_taken(source: NativeSource, built: Path, what: str) -> None:
    """As root with the HOME of a user, say."""
    if what == "folder":
        os.chown(built.parent, 12345, 12345)
        library = native_library(source, built.parent)
        assert library is not None and built.parent not in library.parents
    else:
        os.chown(built, 12345, 12345)
        assert native_library(source, built.parent) == built and built.stat().st_uid == 0


def test_a_user_without_a_home_has_one_of_the_process(
    source: NativeSource, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers run as users that /etc/passwd does not know."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    library = native_library(source)
    assert library is not None and library != built and not library.parent.stat().st_mode & 0o077


def test_a_source_that_does_not_compile_is_tried_once_and_ends_nothing(source: NativeSource, built: Path) -> None:
    source.path.write_text("int answer( { return 42; }")
    assert native_library(source, built.parent) is None
