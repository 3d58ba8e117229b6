"""The compiled step is made once; where it cannot be made nothing breaks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serve_app.engine.cpu import native_build
from serve_app.engine.cpu.native_build import native_library


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_library_is_made_once_and_again_for_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(native_build, "_SOURCE", source)
    first = native_library(tmp_path / "cache")
    assert first is not None and first == native_library(tmp_path / "cache")
    source.write_text('extern "C" int one() { return 2; }')
    other = native_library(tmp_path / "cache")
    assert other is not None and other != first and first.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_the_compiler_refuses_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no program")
    monkeypatch.setattr(native_build, "_SOURCE", source)
    assert native_library(tmp_path / "cache") is None
    assert "could not be made" in caplog.text and not list((tmp_path / "cache").glob("*.so"))


def test_without_a_compiler_there_is_none_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_library(tmp_path) is None
    assert "no C++ compiler" in caplog.text
