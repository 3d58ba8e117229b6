"""Blocks over HTTP, trusting nobody: `GET /ipfs/<cid>?format=raw`, as every trustless gateway and our own peers answer.

Every block is hashed here. Source: https://specs.ipfs.tech/http-gateways/trustless-gateway/
"""

from __future__ import annotations

from shard_tools.cid import Cid
from shard_tools.errors import NotFoundError, UnreachableError
from shard_tools.http_client import Answer, HttpClient, Patience
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block

RAW = "application/vnd.ipld.raw"


class HttpSource:
    """A BlockSource at one address, shared by threads."""

    def __init__(self, url: str, kind: str, patience: Patience, secret: bytes | None = None, depth: int = 0) -> None:
        """kind: what errors call it, `gateway` or `peer`. The rest as of HttpClient. Raises InputError."""
        self._label = f"{kind} {url}"
        self._client = HttpClient(url, self._label, patience, secret, depth)

    @property
    def label(self) -> str:
        return self._label

    def get(self, cid: Cid) -> bytes:
        answer = self._ask("GET", cid)
        if answer.status == 200:
            return check_block(cid, answer.body, self._label)
        if answer.status in (404, 410):
            raise NotFoundError(f"block {cid}", self._label, answer.said)
        raise UnreachableError(self._label, answer.problem())

    def has(self, cid: Cid) -> bool:
        answer = self._ask("HEAD", cid)
        if answer.status not in (200, 404, 410):
            raise UnreachableError(self._label, answer.problem())
        return answer.status == 200

    def close(self) -> None:
        """No connection is kept any more."""
        self._client.close()

    def _ask(self, method: str, cid: Cid) -> Answer:
        return self._client.ask(method, f"/ipfs/{cid}?format=raw", RAW, MAX_BLOCK_BYTES)
