"""The README's tree is the repository's."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree_paths() -> list[str]:
    """Every path that the README's tree names, from the root."""
    found = re.search(r"^shard_tools/ .*?(?=^```)", (ROOT / "README.md").read_text(), re.S | re.M)
    assert found, "the README has no tree"
    paths, top = [], ""
    for line in found[0].splitlines():
        indented = line.startswith(" ")
        if not indented:
            top = line.split()[0]
            paths.append(top)
            continue
        for name in line.split():
            if not re.fullmatch(r"[\w.]+(/|\.py|\.yaml)", name):
                break  # the description begins
            paths.append(top + name)
    return paths


def test_every_path_of_the_tree_exists() -> None:
    paths = tree_paths()
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_names_every_folder_of_code() -> None:
    packages = ("shard_tools", "serve_app", "kuberay", "benchmarks", "tests")
    folders = [f"{p}/" for p in packages]
    folders += [f"{p}/{d.name}/" for p in packages[:2] for d in (ROOT / p).iterdir() if (d / "__init__.py").exists()]
    assert set(folders) <= set(tree_paths())


def test_the_tree_names_every_file_beside_those_folders() -> None:
    files = [f"{p}/{f.name}" for p in ("shard_tools", "serve_app") for f in (ROOT / p).glob("*.py")]
    assert {f for f in files if not f.endswith("__init__.py")} <= set(tree_paths())
