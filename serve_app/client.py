"""The client behind `llmd chat`, `complete` and `status`: the official openai package, and what it does not know of us.

Knows HTTP only: no model, no Ray, no torch.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import openai

from serve_app.errors import PipelineError, RequestError
from shard_tools.errors import InputError, LlmdError

TIMEOUT_S = 600.0  # of one read: a long prompt on a busy CPU is silent for minutes
MAX_STATE_BYTES = 4 << 20
OUR_FIELDS = frozenset({"top_k", "llmd"})  # not OpenAI's: they travel in extra_body


@dataclass(slots=True)
class Conversation:
    """What was sent and what came back, as JSON that `llmd receipt verify` reads."""

    request: dict[str, Any]
    text: str = ""
    finish_reason: str | None = None
    llmd: dict[str, str] = field(default_factory=dict)

    @property
    def receipt(self) -> bytes | None:
        """The bundle, once the answer has ended; None where the server gave none."""
        text = self.llmd.get("receipt")
        return None if text is None else base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    def save(self, path: Path) -> None:
        """Writes the receipt to `path`, and beside it the request and the response that it is of. Raises InputError."""
        if self.receipt is None:
            raise InputError(f"the server gave no receipt with this answer; nothing was written to {path}")
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        response = {"choices": [choice | {"finish_reason": self.finish_reason}], "llmd": self.llmd}
        try:
            path.write_bytes(self.receipt)
            for name, value in (("request", self.request), ("response", response)):
                path.with_name(f"{path.name}.{name}.json").write_text(json.dumps(value, indent=1), "utf-8")
        except OSError as e:
            raise InputError(f"cannot write {e.filename or path}: {e.strerror}") from e


class Client:
    """One server. Every method raises an LlmdError that says what to do when it cannot be reached or refuses."""

    def __init__(self, url: str, api_key_file: Path | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no URL of a server; write http://host:port")
        key = _read_key(api_key_file) if api_key_file else "none"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._openai = openai.OpenAI(base_url=f"{self._url}/v1", api_key=key, max_retries=1, timeout=TIMEOUT_S)

    def first_model(self) -> str:
        """The name of a model that is served."""
        try:
            names = [model.id for model in self._openai.models.list()]
        except openai.OpenAIError as e:
            raise self._explained(e) from e
        if not names:
            raise PipelineError(f"{self._url} serves no model yet; try again shortly")
        return names[0]

    def ask(self, kind: Literal["chat", "completion"], body: Mapping[str, Any], said: Conversation) -> Iterator[str]:
        """The answer's text as it streams; `said` is complete once this ends. Raises LlmdError."""
        said.request = {**body, "stream": True}
        plain = {k: v for k, v in said.request.items() if k not in OUR_FIELDS}
        extra = {k: v for k, v in said.request.items() if k in OUR_FIELDS}
        endpoint: Any = self._openai.chat.completions if kind == "chat" else self._openai.completions
        try:
            with endpoint.create(**plain, extra_body=extra) as chunks:
                for chunk in chunks:
                    said.llmd = getattr(chunk, "llmd", None) or said.llmd
                    for choice in chunk.choices:
                        said.finish_reason = choice.finish_reason or said.finish_reason
                        piece = (choice.delta.content if kind == "chat" else choice.text) or ""
                        said.text += piece
                        if piece:
                            yield piece
        except (openai.APIConnectionError, httpx.HTTPError) as e:  # the latter from openai before version 3
            if not said.text:
                raise self._unreachable(e.__cause__ or e) from e
            raise PipelineError(f"the connection to {self._url} broke in the middle of the answer: {e}") from e
        except openai.OpenAIError as e:
            raise self._explained(e) from e
        if said.finish_reason is None:
            raise PipelineError(f"{self._url} ended the answer without saying why; it may be cut short")

    def state(self) -> dict[str, Any]:
        """What the cluster says of itself."""
        try:
            response = httpx.get(f"{self._url}/v1/cluster/state", headers=self._headers, timeout=10)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        try:
            value = json.loads(response.content[:MAX_STATE_BYTES])
        except ValueError:
            value = None
        if response.status_code != 200 or not isinstance(value, dict):
            raise RequestError(f"{self._url} answered {response.status_code}: {_said(value) or response.text[:200]}")
        return value

    def _explained(self, error: openai.OpenAIError) -> LlmdError:
        if isinstance(error, openai.APIConnectionError):
            return self._unreachable(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):
            hint = " Give a key with --api-key-file." if error.status_code == 401 else ""
            return RequestError(
                f"{self._url} refused ({error.status_code}): {_said(error.body) or error.message}{hint}"
            )
        return PipelineError(f"{self._url}: {error}")

    def _unreachable(self, cause: BaseException) -> LlmdError:
        return PipelineError(
            f"nothing answers at {self._url} ({cause}). Start it with `llmd serve`, or say --url where it is."
        )


def fresh_nonce() -> dict[str, str]:
    """The request's `llmd` field: a nonce nobody could have known before, so that the receipt is of now."""
    return {"nonce": secrets.token_hex(32)}


def _said(body: object) -> str:
    """The message in an error body: whole, or as the openai client has unwrapped it."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            return str(inner.get("message") or "")[:1000]
    return ""


def _read_key(path: Path) -> str:
    try:
        with path.open("rb") as file:
            lines = file.read(4096).decode("ascii", "replace").split()
    except OSError as e:
        raise InputError(f"cannot read the API key in {path}: {e.strerror}") from e
    if len(lines) != 1 or not lines[0].isascii():
        raise InputError(f"{path} should hold one API key and nothing else")
    return lines[0]
