"""What import contracts cannot say: every import, also one inside a function, stands in the one home of its library.

import-linter keeps the floors (pyproject.toml) of the packages that it is told of; this reads every file there is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("serve_app", "shard_tools", "kuberay") for p in (ROOT / package).rglob("*.py"))
HOMES = {
    "ray": ("serve_app/cluster/", "serve_app/cli.py"),
    "torch": ("serve_app/engine/", "shard_tools/checkpoint/"),
    "transformers": ("serve_app/engine/", "shard_tools/checkpoint/"),
    "fastapi": ("serve_app/api/",),
    "starlette": ("serve_app/api/",),
    "pydantic": ("serve_app/api/", "serve_app/config.py"),
    "cryptography": ("shard_tools/signing.py",),
    "tokenizers": ("serve_app/api/text.py",),
    "jinja2": ("serve_app/api/text.py",),
    "ipfshttpclient": ("shard_tools/store/ipfs.py",),
    "model_signing": ("shard_tools/openssf.py",),
}
NOWHERE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}  # they run what they read
LONGEST = 400  # lines: past it a file holds two ideas


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_keeps_the_rules_of_the_house(path: Path) -> None:
    """One home for each library; nothing that runs what it reads; a first word that says what it is for; one idea."""
    where, text = path.relative_to(ROOT).as_posix(), path.read_text()
    tree = ast.parse(text)
    names = set(imported(tree))
    strangers = sorted(n for n in names if n in HOMES and not where.startswith(HOMES[n]))
    assert not strangers, f"{where} imports {strangers[0]}, whose home is {' or '.join(HOMES[strangers[0]])}"
    assert not names & NOWHERE
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec"}
    assert not text.strip() or ast.get_docstring(tree), f"{where} does not say what it is for"
    assert len(text.splitlines()) <= LONGEST


def test_every_home_is_lived_in() -> None:
    """A rule about a library that nobody imports, or about a file that is gone, guards nothing."""
    names = {p.relative_to(ROOT).as_posix(): set(imported(ast.parse(p.read_text()))) for p in FILES}
    for library, homes in HOMES.items():
        assert any(library in found for where, found in names.items() if where.startswith(homes)), library
    assert all((ROOT / home).exists() for homes in HOMES.values() for home in homes)
