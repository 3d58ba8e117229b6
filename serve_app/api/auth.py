"""Who may ask: API keys, known here by their SHA-256 only, and the door that asks for one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.problems import UNAUTHORIZED
from serve_app.errors import ConfigError

MIN_KEY_CHARS = 16  # of a key kept in the clear; shorter ones can be guessed over the network
MAX_FILE_BYTES = 1 << 20
OPEN_PATHS = frozenset({"/", "/health"})  # probes and people who look whether anything is there

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},512}}")


class ApiKeys:
    """The accepted keys. None at all means that no key is asked for."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = tuple(digests)

    @classmethod
    def load(cls, file: Path | None, sha256: Iterable[str] = ()) -> ApiKeys:
        """The keys of a file and of hex hashes together.

        A line of the file is a key, or `sha256:` and the hash of one; `#` begins a comment line. Raises ConfigError for
        a line that is neither, and for a file without any key: it was meant to close the door.
        """
        digests = [bytes.fromhex(text) for text in sha256]
        if file is not None:
            digests += _read(file)
        if not digests:
            raise ConfigError(f"{file or 'ingress.api_keys'} holds no key; nobody could ask, or everybody")
        return cls(digests)

    @property
    def required(self) -> bool:
        """Whether a key must be shown."""
        return bool(self._digests)

    def accept(self, key: str) -> bool:
        """Whether `key` is one of them; takes as long for a wrong one as for a right one."""
        digest = hashlib.sha256(key.encode()).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class KeyDoor:
    """Lets a request through to `app` when it shows an accepted key, or asks for an open path."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys.required:
            path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if path not in OPEN_PATHS and not (scheme.lower() == "bearer" and self._keys.accept(key.strip())):
                await UNAUTHORIZED.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _read(file: Path) -> list[bytes]:
    try:
        with file.open("rb") as f:
            data = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read the API keys in {file}: {e.strerror}") from e
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_FILE_BYTES} bytes; is it a file of API keys?")
    digests = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if hashed := _HASHED.fullmatch(line):
            digests.append(bytes.fromhex(hashed[1]))
        elif _KEY.fullmatch(line) and not line.startswith("sha256:"):
            digests.append(hashlib.sha256(line.encode()).digest())
        else:  # the line itself may be a key: not shown
            raise ConfigError(
                f"{file}, line {number}: expected a key of {MIN_KEY_CHARS} to 512 printable characters without spaces, "
                f"or sha256: and 64 hex digits"
            )
    return digests
