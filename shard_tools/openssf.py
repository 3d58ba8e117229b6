"""Signatures of OpenSSF Model Signing (v1.0) over a model's folder: made, and checked before a folder is published.

A bundle is a Sigstore bundle: a DSSE envelope over an in-toto statement that lists the SHA-256 of every file. The
package model_signing makes and checks it; this is its only home, and it is an extra, for it brings thirteen others.
Keys are EC keys (P-256, P-384, P-521) as PEM. It takes no Ed25519 key, which publishers' keys of this project are: so a
bundle stands beside our own signature, and says nothing of a CID.
Source: https://github.com/ossf/model-signing-spec, https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError, SignatureError

MAX_BUNDLE_BYTES = 16 << 20  # some 100,000 files
MAX_KEY_BYTES = 16 << 10
PREDICATE = "https://model_signing/signature/v1.0"


def sign_folder(folder: Path, private_key: Path, bundle: Path) -> None:
    """`bundle` is a signature over every file in the folder but itself and git's. Raises InputError."""
    package = _package()
    _check_folder(folder)
    _check_key(private_key, private=True)
    if bundle.exists():
        raise InputError(f"{bundle} exists; name a file that does not")
    hashed = package.hashing.Config().set_ignored_paths(paths=_inside(folder, bundle))
    try:
        signing = package.signing.Config().use_elliptic_key_signer(private_key=private_key)
        signing.set_hashing_config(hashed).sign(folder, bundle)
    except Exception as e:  # what bad keys and folders make it raise is no closed set
        raise InputError(f"{folder} was not signed with {private_key}: {_said(e)}") from e


def check_folder(folder: Path, bundle: Path, public_key: Path, needed: Iterable[str] = ()) -> None:
    """Returns if the folder's files are those that the key's owner signed. needed: files that must be among them.

    Raises SignatureError; InputError where the package, the key or the bundle cannot be used.
    """
    package = _package()
    _check_folder(folder)
    _check_key(public_key, private=False)
    resources = _resources(bundle)
    verifying = package.verifying.Config()
    if _inside(folder, bundle):  # as the package's own command: the signature is no file of the model
        hashed = package.hashing.Config().set_ignored_paths(paths=_inside(folder, bundle))
        verifying.set_hashing_config(hashed)
    try:
        verifying.use_elliptic_key_verifier(public_key=public_key).verify(folder, bundle)
    except Exception as e:  # the same
        raise SignatureError(f"{bundle} is no signature by {public_key} over {folder}: {_said(e)}") from e
    missing = sorted(set(needed) - resources)
    if missing:
        raise SignatureError(
            f"{bundle} says nothing of {missing[0]!r}, which the model is made of: sign the whole folder"
        )


def _package() -> Any:
    try:
        import model_signing
    except ImportError as e:
        raise InputError(
            f"OpenSSF signatures need the package model-signing ({e}): pip install 'llm-d[model-signing]'"
        ) from e
    return model_signing


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder, and these signatures are over the files of one")


def _inside(folder: Path, bundle: Path) -> list[Path]:
    """The bundle's own path in the folder, if it lies there."""
    top, file = folder.resolve(), bundle.resolve()
    return [file.relative_to(top)] if file.is_relative_to(top) else []


def _check_key(path: Path, private: bool) -> None:
    kind = "PRIVATE KEY" if private else "PUBLIC KEY"
    try:
        mode, data = path.stat().st_mode & 0o777, path.open("rb").read(MAX_KEY_BYTES)
    except OSError as e:
        raise InputError(f"cannot read the key {path}: {e.strerror}") from e
    if kind.encode() not in data:
        raise InputError(
            f"{path} holds no {kind.lower()} as PEM: make one with `openssl ecparam -name prime256v1 -genkey`"
        )
    if private and mode & 0o077:
        raise InputError(f"the private key {path} has mode {mode:o}: others may read it. Run: chmod 600 {path}")


def _resources(bundle: Path) -> set[str]:
    """The files that the bundle's statement lists; whether it is signed is another question."""
    try:
        with bundle.open("rb") as f:
            data = f.read(MAX_BUNDLE_BYTES + 1)
    except OSError as e:
        raise InputError(f"cannot read the bundle {bundle}: {e.strerror}") from e
    if len(data) > MAX_BUNDLE_BYTES:
        raise InputError(f"the bundle {bundle} has more than {MAX_BUNDLE_BYTES} bytes")
    try:
        statement = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"], validate=True))
        if statement["predicateType"] != PREDICATE or statement["predicate"]["serialization"]["method"] != "files":
            raise InputError(f"{bundle} is of another kind than {PREDICATE} over whole files: sign the folder anew")
        return {str(item["name"]) for item in statement["predicate"]["resources"]}
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise InputError(f"{bundle} is no bundle of OpenSSF Model Signing: {_said(e)}") from e


def _said(error: Exception) -> str:
    if isinstance(error, AttributeError) and "curve" in str(error):
        return "the key is no EC key (P-256, P-384 or P-521); Ed25519, as of `llmd keys`, is not taken by the format"
    return (str(error) or type(error).__name__)[:500]
