"""GET /v1/receipts/{id}: the receipt of an answer, whether it was audited, and what was found.

The id is the answer's own: 128 random bits, known to who asked. Receipts are the auditor's, which keeps the latest in
memory; what it found it keeps on disk, without prompts, and clients keep the receipts that they want to keep.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from fastapi.responses import JSONResponse

from serve_app.api.problems import INVALID, Problem, unpadded
from shard_tools.canonical import Value
from shard_tools.cid import Cid

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Receipts(Protocol):
    """Whoever keeps them."""

    async def lookup(self, id: str) -> dict[str, Value] | None:
        """All that is known of this answer; None if nothing is. Raises PipelineError if nobody can be asked."""


async def receipt_response(receipts: Receipts | None, id: str) -> JSONResponse:
    """The HTTP answer. Raises PipelineError."""
    if receipts is None:
        why = "This server keeps no receipts: nothing is audited here (audit.rate, audit.on_request)."
        return Problem(404, INVALID, "receipt_not_found", why).response()
    found = await receipts.lookup(id) if _ID.fullmatch(id) else None
    if found is None:
        why = "There is no receipt of this id here: it is another's, not logged yet (a second), or too old to be kept."
        return Problem(404, INVALID, "receipt_not_found", why).response()
    return JSONResponse(_json(found))


def _json(value: Value) -> Any:
    """Bytes as every answer of ours writes them."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, bytes):
        return unpadded(value)
    return str(value) if isinstance(value, Cid) else value
