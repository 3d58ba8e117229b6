"""Names over HTTP: `GET <url>/names/<name>`, answered with the record that a directory index keeps in that file.

So any web server over a store's folder is an index, and so is the endpoint of a cluster's node. It is not trusted: a
record leads to a release, whose signature, version and expiry whoever opens the model checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from shard_tools.choice import absolute_path
from shard_tools.cid import Cid
from shard_tools.cluster_key import load_key
from shard_tools.errors import FormatError, InputError, NotFoundError, UnreachableError
from shard_tools.http_client import Answer, HttpClient, Patience
from shard_tools.index.model_index import MAX_RECORD_BYTES, ModelRecord

MAX_LIST_BYTES = 1 << 20

_ANSWER_S = 10.0  # for a kilobyte
_NAME = re.compile(r"[A-Za-z0-9._/-]{1,200}")


def open_http(*, url: str, cluster_key: str = "") -> HttpIndex:
    """The index `{kind: http, url: ...}` of a config; cluster_key: file, if a node of ours answers."""
    return HttpIndex(url, load_key(absolute_path(cluster_key)) if cluster_key else None)


class HttpIndex:
    """A ModelIndex that is only read: names are published where the server has them from."""

    def __init__(self, url: str, secret: bytes | None = None) -> None:
        """secret: the cluster's key. Raises InputError for what is no address."""
        self._label = f"index {url}"
        self._client = HttpClient(url, self._label, Patience(answer_s=_ANSWER_S), secret)

    @property
    def label(self) -> str:
        return self._label

    def resolve(self, name: str) -> ModelRecord:
        target = f"/names/{quote(quote(name, safe=''), safe='')}"  # a file whose name has a %2F
        answer = self._client.ask("GET", target, "*/*", MAX_RECORD_BYTES)
        if answer.status in (404, 410):
            raise NotFoundError(f"the model {name[:200]!r}", self._label, answer.said)
        return ModelRecord.decode(self._body(answer))

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        raise InputError(f"{self._label} is only read: publish {name!r} to the folder that it serves")

    def names(self) -> tuple[str, ...]:
        answer = self._client.ask("GET", "/names", "text/plain", MAX_LIST_BYTES)
        try:
            names = tuple(sorted(self._body(answer).decode().splitlines()))
        except UnicodeDecodeError as e:
            raise FormatError(f"{self._label} answers with no list of names") from e
        if not all(_NAME.fullmatch(name) for name in names):
            raise FormatError(f"{self._label} answers with no list of names: a plain web server has none")
        return names

    def _body(self, answer: Answer) -> bytes:
        if answer.status != 200:
            raise UnreachableError(self._label, answer.problem())
        return answer.body
