"""`llmd trust`: a policy of publishers as a signed file: made, signed by its root keys, handed on, replaced."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from shard_tools.console import KEY, KeyOption, line, refusals, signer_at
from shard_tools.errors import InputError
from shard_tools.signing import PublicKey, key_text, parse_key, read_public_key
from shard_tools.trust import Rule, TrustPolicy
from shard_tools.trust_root import MAX_TRUST_BYTES, SignedTrustRoot, TrustRoot

FileArgument = Annotated[Path, typer.Argument(help="File of the trust root.")]
DAY_S = 86400


def register(app: typer.Typer) -> None:
    """The commands are part of `app`."""
    trust = typer.Typer(no_args_is_help=True, help="Whose models count: a signed policy that can change hands.")
    trust.command("new")(new)
    trust.command("sign")(sign)
    trust.command("update")(update)
    trust.command("show")(show)
    app.add_typer(trust, name="trust")


def new(
    file: FileArgument,
    rule: Annotated[list[str], typer.Option("--rule", help="NAMES:K=KEY,KEY... such as 'org/*:2=a.pub,b.pub,c.pub'.")],
    root: Annotated[list[str], typer.Option("--root", help="A root key, as text or a .pub file.")],
    root_threshold: Annotated[int, typer.Option("--root-threshold", min=1, help="Root keys that must sign.")] = 1,
    revoke: Annotated[list[str], typer.Option("--revoke", help="A key that counts no more.")] = [],  # noqa: B006
    after: Annotated[Path | None, typer.Option("--after", help="The root that it is to replace.")] = None,
    valid_days: Annotated[int, typer.Option("--valid-days", min=1, max=3650)] = 365,
) -> None:
    """Write a policy, unsigned. Those with root keys then run `llmd trust sign`."""
    with refusals():
        revoked = frozenset(_key(text) for text in revoke)
        version = 1
        if after is not None:
            before = _read(after).root
            version, revoked = before.version + 1, revoked | before.policy.revoked
        policy = TrustPolicy(tuple(_rule(text) for text in rule), revoked)
        expires_s = int(time.time()) + valid_days * DAY_S
        made = TrustRoot(version, expires_s, frozenset(_key(text) for text in root), root_threshold, policy)
        _write(file, SignedTrustRoot(made))
        line(f"Wrote {file}, version {version}; {root_threshold} root keys must sign it: llmd trust sign {file}")


def sign(file: FileArgument, key: KeyOption = KEY) -> None:
    """Sign a policy with a root key. Read it first: llmd trust show."""
    with refusals():
        signed, signer = _read(file), signer_at(key)
        _write(file, signed.signed_also_by(signer))
        line(f"Signed version {signed.root.version} by {key_text(signer.public)}")


def update(file: FileArgument, successor: Annotated[Path, typer.Argument(help="The next version.")]) -> None:
    """Replace a trust root by its successor, if enough of its root keys signed that."""
    with refusals():
        current, following = _read(file).accept(), _read(successor)
        root = following.succeed(current)
        root.check_fresh(int(time.time()))
        _write(file, following)
        line(f"{file} is now version {root.version}")


def show(file: FileArgument) -> None:
    """Say what a trust root says, and who signed it."""
    with refusals():
        signed = _read(file)
        root = signed.root
        line(f"version {root.version}, until {time.strftime('%Y-%m-%d', time.gmtime(root.expires_s))}")
        for rule in root.policy.rules:
            line(f"{rule.names}: {rule.threshold} of {', '.join(key_text(key) for key in sorted(rule.keys))}")
        for key in sorted(root.policy.revoked):
            line(f"revoked: {key_text(key)}")
        line(f"root: {root.threshold} of {', '.join(key_text(key) for key in sorted(root.keys))}")
        for key, _ in signed.signatures:
            line(f"signed by {key_text(key)}{'' if key in root.keys else ', which is no root key of this version'}")
        signed.accept()
        line("Enough of its own root keys signed it.")


def _rule(text: str) -> Rule:
    left, equals, right = text.partition("=")
    names, colon, threshold = left.partition(":")
    if not equals or (colon and not threshold.isdecimal()):
        raise InputError(f"--rule {text[:200]!r}: expected NAMES=KEY or NAMES:K=KEY,KEY...")
    return Rule(names, frozenset(_key(item) for item in right.split(",")), int(threshold or 1))


def _key(text: str) -> PublicKey:
    return read_public_key(Path(text)) if Path(text).is_file() else parse_key(text)


def _read(file: Path) -> SignedTrustRoot:
    try:
        with file.expanduser().open("rb") as f:
            return SignedTrustRoot.decode(f.read(MAX_TRUST_BYTES + 1))
    except OSError as e:
        raise InputError(f"cannot read the trust root {file}: {e.strerror}") from e


def _write(file: Path, signed: SignedTrustRoot) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_bytes(signed.encode())
        fresh.replace(file)
    except OSError as e:
        raise InputError(f"cannot write the trust root {file}: {e.strerror}") from e
