"""GET /v1/receipts/{id}: what is known of an answer, or that nothing is, or that nobody can be asked."""

from __future__ import annotations

from typing import Any

from serve_app.api.echo import EchoGenerator
from serve_app.errors import PipelineError
from shard_tools.canonical import Value
from shard_tools.cid import Cid, Codec
from tests.serve_app.api.echo_server import Serve

CID = Cid.of(Codec.DAG_CBOR, b"")


class Kept:
    """Implements api/receipts.py's Receipts for two ids."""

    async def lookup(self, id: str) -> dict[str, Value] | None:
        if id == "down":
            raise PipelineError("the auditor does not answer")
        return {"id": id, "receipt": b"\xff\xfe", "audit": {"path": [b"\0"], "of": CID}} if id == "chatcmpl-1" else None


def test_a_receipt_is_shown_with_what_was_found(serve: Serve) -> None:
    """Bytes are base64url without padding, as everywhere; an id unknown, malformed or not answered has its error."""
    http = serve(EchoGenerator(), receipts=Kept()).http
    found: Any = http.get("/v1/receipts/chatcmpl-1").json()
    assert found == {"id": "chatcmpl-1", "receipt": "__4", "audit": {"path": ["AA"], "of": str(CID)}}
    for id in ("chatcmpl-2", "a%20b", "x" * 200):
        missing = http.get(f"/v1/receipts/{id}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "receipt_not_found")
    assert http.get("/v1/receipts/down").status_code == 503


def test_where_nobody_audits_it_is_said(serve: Serve) -> None:
    missing = serve(EchoGenerator()).http.get("/v1/receipts/chatcmpl-1")
    assert missing.status_code == 404 and "audit.rate" in missing.json()["error"]["message"]
