"""The commands, as a person runs them: what they print, what they leave, how they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from shard_tools.cli import register
from shard_tools.store.directory import DirectoryStore
from tests.tiny_models import write_tiny_checkpoint

app = typer.Typer()
register(app)


class Desk:
    """One person's directories."""

    def __init__(self, root: Path) -> None:
        self.root, self.store, self.key = root, root / "store", root / "keys" / "publisher.pem"

    def run(self, *words: object) -> Result:
        environment = {"LLMD_STORE": str(self.store), "LLMD_KEY": str(self.key)}
        return CliRunner().invoke(app, [str(word) for word in words], env=environment)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "desk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("ck"), layers=2)


def cid_of(text: str) -> str:
    return next(word for word in text.split() if word.startswith("bafyrei"))


def test_publish_fetch_verify_and_ls_agree_on_the_manifest(desk: Desk, folder: Path, tmp_path: Path) -> None:
    published = desk.run("publish", folder, "--name", "org/tiny")
    assert published.exit_code == 0, published.output
    cid = cid_of(published.stdout)
    assert cid in desk.run("ls").stdout and "org/tiny" in desk.run("ls").stdout
    assert cid in desk.run("shard", folder, "--name", "org/tiny").stdout
    other = Desk(tmp_path / "other")
    key = desk.run("keys", "show").stdout.strip()
    fetched = other.run("fetch", "org/tiny", "--from", desk.store, "--trust", key)
    assert fetched.exit_code == 0 and cid in fetched.stdout
    public = desk.key.with_suffix(".pub")
    for model in ("org/tiny", cid):
        verified = other.run("verify", model, "--trust", public)
        assert verified.exit_code == 0 and "Whole" in verified.stdout and cid in verified.stdout


def test_a_stage_fetches_its_layers_and_names_nothing(desk: Desk, folder: Path, tmp_path: Path) -> None:
    desk.run("publish", folder, "--name", "tiny")
    part = tmp_path / "part"
    fetched = desk.run("fetch", "tiny", "--from", desk.store, "--store", part, "--layers", "0:1")
    assert fetched.exit_code == 0 and "pinned, not named" in fetched.stdout
    assert len(list(DirectoryStore(part).cids())) < len(list(DirectoryStore(desk.store).cids()))
    assert desk.run("ls", "--store", part).stdout.split()[0] == "pinned"


def refusal(result: Result) -> str:
    """The one line that a refused command says."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("llmd: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


def test_refusals_say_what_was_asked_and_what_to_do(desk: Desk, folder: Path, tmp_path: Path) -> None:
    assert "no checkpoint" in refusal(desk.run("publish", tmp_path / "nowhere", "--name", "x"))
    assert "no name of a model" in refusal(desk.run("publish", folder, "--name", "../x"))
    assert "choose one of" in refusal(desk.run("publish", folder, "--name", "x", "--dtype", "int4"))
    assert "no publisher is trusted" in refusal(Desk(tmp_path / "new").run("verify", "x"))
    desk.run("publish", folder, "--name", "tiny")
    assert "Known: tiny" in refusal(desk.run("verify", "tinny"))
    assert "is no store" in refusal(desk.run("fetch", "tiny", "--from", tmp_path / "nowhere"))
    assert "expected a:b" in refusal(desk.run("fetch", "tiny", "--from", desk.store, "--layers", "1:9"))
    stranger = "llmd-ed25519:" + "00" * 32
    assert "trusted publisher" in refusal(desk.run("fetch", "tiny", "--from", desk.store, "--trust", stranger))
    assert "not a public key" in refusal(desk.run("verify", "tiny", "--trust", "abc"))
    assert "never overwritten" in refusal(desk.run("keys", "new"))


def test_a_flipped_byte_is_named_and_a_second_fetch_heals_it(desk: Desk, folder: Path, tmp_path: Path) -> None:
    desk.run("publish", folder, "--name", "tiny")
    copy = tmp_path / "copy"
    assert desk.run("fetch", "tiny", "--from", desk.store, "--store", copy).exit_code == 0
    victim = max((path for path in (copy / "blocks").rglob("bafkrei*")), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    verified = desk.run("verify", "tiny", "--store", copy)
    assert verified.exit_code == 2 and victim.name in verified.stderr
    assert desk.run("fetch", "tiny", "--from", desk.store, "--store", copy).exit_code == 0
    assert desk.run("verify", "tiny", "--store", copy).exit_code == 0


def test_keys_are_private_and_made_once(desk: Desk) -> None:
    made = desk.run("keys", "new").stdout
    assert made == desk.run("keys", "show").stdout and made.startswith("llmd-ed25519:")
    assert desk.key.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_ctrl_c_names_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    """A publish stopped after its first blocks exits 130 with no name; the same command then finishes."""
    folder = write_tiny_checkpoint(tmp_path / "ck", layers=8, hidden=512, vocab=4000)
    desk = Desk(tmp_path / "desk")
    code = "import typer; from shard_tools.cli import register; app = typer.Typer(); register(app); app()"
    words = [sys.executable, "-c", code, "publish", str(folder), "--name", "m", "--store", str(desk.store)]
    publisher = subprocess.Popen(
        [*words, "--key", str(desk.key)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
        preexec_fn=hear_ctrl_c,
    )
    deadline = time.monotonic() + 60
    while not any((desk.store / "blocks").glob("*/*")) and time.monotonic() < deadline and publisher.poll() is None:
        time.sleep(0.002)  # until the first block is there, not for luck
    os.kill(publisher.pid, signal.SIGINT)
    _, said = publisher.communicate(timeout=60)
    assert publisher.returncode == 130 and "again" in said and "Traceback" not in said, said
    assert not list((desk.store / "names").glob("*")) and not list((desk.store / "tmp").glob("*"))
    assert desk.run("publish", folder, "--name", "m").exit_code == 0
    assert desk.run("verify", "m").exit_code == 0


def hear_ctrl_c() -> None:
    """A job that a shell started in the background is deaf to SIGINT, and so would be what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_model_travels_in_one_file(desk: Desk, folder: Path, tmp_path: Path) -> None:
    """Out of one store, into another that trusts the publisher; a stranger's file is kept, and named by nobody."""
    desk.run("publish", folder, "--name", "org/tiny")
    car, other = tmp_path / "tiny.car", Desk(tmp_path / "other")
    exported = desk.run("car", "export", "org/tiny", car)
    assert exported.exit_code == 0 and [path.name for path in tmp_path.glob("*.car*")] == ["tiny.car"]
    assert "trusted publisher" in refusal(other.run("car", "import", car, "--trust", "llmd-ed25519:" + "00" * 32))
    assert "No model is named" in other.run("ls").stdout
    imported = other.run("car", "import", car, "--trust", desk.key.with_suffix(".pub"))
    assert imported.exit_code == 0 and cid_of(imported.stdout) == cid_of(exported.stdout)
    assert other.run("verify", "org/tiny", "--trust", desk.key.with_suffix(".pub")).exit_code == 0
    assert "cannot write" in refusal(desk.run("car", "export", "org/tiny", tmp_path / "no" / "x.car"))
    assert "cut short" in refusal(other.run("car", "import", truncated(car), "--trust", desk.key.with_suffix(".pub")))
    assert "cannot read" in refusal(other.run("car", "import", tmp_path / "absent.car"))
    assert "Known: org/tiny" in refusal(desk.run("car", "export", "tiny", tmp_path / "x.car"))


def test_a_release_is_signed_by_a_second_publisher_and_renewed(desk: Desk, folder: Path, tmp_path: Path) -> None:
    """A trust root asks for both signatures; a renewal is a newer release, which both sign again."""
    desk.run("publish", folder, "--name", "tiny")
    second, policy = tmp_path / "second.pem", tmp_path / "trust"
    both = f"*:2={desk.run('keys', 'show').stdout.strip()},{desk.run('keys', 'new', '--key', second).stdout.strip()}"
    made = desk.run("trust", "new", policy, "--rule", both, "--root", second.with_suffix(".pub"))
    assert made.exit_code == 0 and desk.run("trust", "sign", policy, "--key", second).exit_code == 0
    for _ in range(2):
        assert "2 must" in refusal(desk.run("verify", "tiny", "--trust", policy))
        assert desk.run("cosign", "tiny", "--key", second).exit_code == 0
        assert desk.run("verify", "tiny", "--trust", policy).exit_code == 0
        assert desk.run("renew", "tiny").exit_code == 0
    assert "trusted publisher" in refusal(desk.run("renew", "tiny", "--key", second))


def truncated(car: Path) -> Path:
    short = car.with_suffix(".short")
    short.write_bytes(car.read_bytes()[:-7])
    return short
