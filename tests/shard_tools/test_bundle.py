"""OpenSSF Model Signing with the real package: what we sign it verifies, what it signed we check before publishing."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from shard_tools.errors import InputError, SignatureError
from shard_tools.fetch import load_manifest
from shard_tools.folder import INDEX, write_folder
from shard_tools.index.directory import DirectoryIndex
from shard_tools.openssf import check_folder, sign_folder
from shard_tools.store.directory import DirectoryStore
from tests.shard_tools.test_cli import Desk, cid_of, refusal
from tests.tiny_models import write_tiny_checkpoint

model_signing = pytest.importorskip("model_signing", reason="pip install 'llm-d[model-signing]'")


class Keys:
    """A private key and its public half, as PEM files."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
        folder.mkdir()
        self.private, self.public = folder / "key.pem", folder / "key.pub"
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        self.private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        self.private.chmod(0o600)
        self.public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "p256", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("ck") / "model", layers=2, max_shard_size="200KB")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def package(*words: object) -> subprocess.CompletedProcess[str]:
    """The package's own command."""
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_we_sign_the_package_verifies_and_what_it_signs_we_check(
    folder: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours.sig", folder / "model.sig"
    sign_folder(folder, keys.private, ours)
    said = package("verify", "key", folder, "--signature", ours, "--public_key", keys.public)
    assert said.returncode == 0 and "succeeded" in said.stdout, said.stderr
    said = package("sign", "key", folder, "--signature", theirs, "--private_key", keys.private)
    assert said.returncode == 0, said.stderr
    check_folder(folder, theirs, keys.public, ["config.json", INDEX])
    theirs.unlink()
    shutil.move(ours, theirs)  # as many publish it: beside the files that it is over
    check_folder(folder, theirs, keys.public, ["config.json", INDEX])
    theirs.unlink()
    monkeypatch.chdir(folder.parent)
    sign_folder(Path(folder.name), keys.private, folder / "absolute.sig")
    check_folder(folder, Path(folder.name) / "absolute.sig", keys.public)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_the_other_curves_of_the_format_work(folder: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    keys = Keys(tmp_path / "keys", ec.generate_private_key(curve))
    sign_folder(folder, keys.private, folder / "model.sig")
    check_folder(folder, folder / "model.sig", keys.public)


def changed(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(path.read_bytes() + b" ")


def test_a_folder_that_is_not_the_signed_one_is_refused(original: Path, keys: Keys, tmp_path: Path) -> None:
    bundle = tmp_path / "m.sig"
    changes: list[Callable[[Path], object]] = [
        changed,
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "extra.json").write_text("{}"),
        lambda f: (f / "config.json").rename(f / "config2.json"),
    ]
    sign_folder(original, keys.private, bundle)
    for i, change in enumerate(changes):
        folder = Path(shutil.copytree(original, tmp_path / str(i)))
        change(folder)
        with pytest.raises(SignatureError, match="is no signature by"):
            check_folder(folder, bundle, keys.public)
    check_folder(original, bundle, keys.public)


def test_another_key_or_an_altered_bundle_is_refused(folder: Path, keys: Keys, tmp_path: Path) -> None:
    bundle, other = tmp_path / "m.sig", Keys(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    sign_folder(folder, keys.private, bundle)
    with pytest.raises(SignatureError, match="is no signature by"):
        check_folder(folder, bundle, other.public)
    value = json.loads(bundle.read_text())
    statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    statement["subject"][0]["name"] = "another"
    value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    bundle.write_text(json.dumps(value))
    with pytest.raises(SignatureError, match="is no signature by"):
        check_folder(folder, bundle, keys.public)


def test_a_signature_that_leaves_out_what_the_model_is_made_of_is_refused(
    folder: Path, keys: Keys, tmp_path: Path
) -> None:
    """Its signer may ignore files; a file that was ignored could be anybody's."""
    bundle = tmp_path / "m.sig"
    hashed = model_signing.hashing.Config().set_ignored_paths(paths=["config.json"])
    signing = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys.private)
    signing.set_hashing_config(hashed).sign(folder, bundle)
    check_folder(folder, bundle, keys.public, ["tokenizer.json"])
    with pytest.raises(SignatureError, match=r"says nothing of 'config\.json'"):
        check_folder(folder, bundle, keys.public, ["config.json"])
    pieces = tmp_path / "pieces.sig"
    hashed = model_signing.hashing.Config().use_shard_serialization()
    signing.set_hashing_config(hashed).sign(folder, pieces)
    with pytest.raises(InputError, match="over whole files"):
        check_folder(folder, pieces, keys.public)


def test_what_cannot_sign_or_be_read_says_why(folder: Path, keys: Keys, tmp_path: Path) -> None:
    edwards, bundle = Keys(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate()), tmp_path / "m.sig"
    with pytest.raises(InputError, match="Ed25519, as of `llmd keys`, is not taken"):
        sign_folder(folder, edwards.private, bundle)
    with pytest.raises(InputError, match="holds no private key"):
        sign_folder(folder, keys.public, bundle)
    keys.private.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        sign_folder(folder, keys.private, bundle)
    keys.private.chmod(0o600)
    with pytest.raises(InputError, match="is no folder"):
        sign_folder(folder / "config.json", keys.private, bundle)
    sign_folder(folder, keys.private, bundle)
    with pytest.raises(InputError, match="exists"):
        sign_folder(folder, keys.private, bundle)
    with pytest.raises(SignatureError, match="Ed25519"):
        check_folder(folder, bundle, edwards.public)
    for data in (b"", b"{}", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "AAAA"}}', b"\xff"):
        bundle.write_bytes(data)
        with pytest.raises(InputError, match="is no bundle"):
            check_folder(folder, bundle, keys.public)
    with pytest.raises(InputError, match="cannot read the bundle"):
        check_folder(folder, tmp_path / "none", keys.public)


def test_a_checked_folder_is_published_and_another_is_not(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """Nothing is stored of a folder that is not as it was signed."""
    desk, bundle = Desk(tmp_path / "desk"), folder / "model.sig"
    assert desk.run("bundle", "sign", folder, "--bundle", bundle, "--private-key", keys.private).exit_code == 0
    assert desk.run("bundle", "verify", folder, "--bundle", bundle, "--public-key", keys.public).exit_code == 0
    words = ("publish", folder, "--name", "tiny", "--model-signing-bundle", bundle)
    assert "give both" in refusal(desk.run(*words))
    done = desk.run(*words, "--model-signing-key", keys.public)
    assert done.exit_code == 0 and "as the owner of" in done.stdout, done.output
    changed(folder)
    other = Desk(tmp_path / "other")
    assert "is no signature by" in refusal(other.run(*words, "--model-signing-key", keys.public))
    assert list(DirectoryStore(other.store).cids()) == []


def test_a_fetched_model_is_a_folder_again_which_can_be_signed_and_is_the_same_model(
    original: Path, keys: Keys, tmp_path: Path
) -> None:
    """transformers loads it, and publishing it gives the same shards."""
    import torch
    from transformers import AutoModelForCausalLM

    desk, folder = Desk(tmp_path / "desk"), tmp_path / "out"
    published = desk.run("publish", original, "--name", "tiny")
    assert desk.run("export", "tiny", folder).exit_code == 0
    assert "exists" in refusal(desk.run("export", "tiny", folder))
    bundle = tmp_path / "m.sig"
    assert desk.run("bundle", "sign", folder, "--bundle", bundle, "--private-key", keys.private).exit_code == 0
    words = ("--model-signing-bundle", bundle, "--model-signing-key", keys.public)
    again = Desk(tmp_path / "again").run("publish", folder, "--name", "tiny", *words)
    assert again.exit_code == 0 and cid_of(again.stdout) == cid_of(published.stdout), again.output
    ids = torch.arange(3, 20)[None]
    first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (original, folder))
    assert torch.equal(first, second)


def test_an_export_that_fails_leaves_no_folder(original: Path, tmp_path: Path) -> None:
    desk, folder = Desk(tmp_path / "desk"), tmp_path / "out"
    assert desk.run("publish", original, "--name", "tiny").exit_code == 0
    store = DirectoryStore(desk.store)
    model = load_manifest(store, DirectoryIndex(desk.store).resolve("tiny").manifest)
    store.delete(model.shards[-1].tensors[-1].leaves[-1].cid)
    assert "is not in" in refusal(desk.run("export", "tiny", folder))
    assert list(tmp_path.iterdir()) == [tmp_path / "desk"]
    assert desk.run("publish", original, "--name", "small", "--quantise", "int8").exit_code == 0
    small = load_manifest(store, DirectoryIndex(desk.store).resolve("small").manifest)
    with pytest.raises(InputError, match="is quantised"):
        write_folder(store, small, folder)
