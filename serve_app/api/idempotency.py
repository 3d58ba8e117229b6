"""Idempotency-Key: which requests are the same one sent again (draft-ietf-httpapi-idempotency-key-header).

What comes of it is decided where requests run (pipeline/keyed.py); this is the last place that knows headers and body.
"""

from __future__ import annotations

import hashlib
import json
import re

from starlette.datastructures import Headers

from serve_app.api.wire import ChatBody, CompletionBody
from serve_app.errors import RequestError
from serve_app.messages.request import Once

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[!#-~]{1,255}")  # printable ASCII without spaces and quotes: UUIDs and the like
_TAG = b"llmd.idempotency.v1\0"
# A retry may choose how it is answered and how long it may take: its answer is the same.
_FREE = {"stream", "stream_options", "timeout"}  # and llmd.deadline_ms


def once_of(headers: Headers, body: ChatBody | CompletionBody) -> Once | None:
    """What shows that this is a retry, None without the header. Raises RequestError for a key that is none.

    Keys are of the API key that is shown with them: nobody meets another's.
    """
    sent = headers.getlist(HEADER)
    if not sent:
        return None
    key = sent[0][1:-1] if re.fullmatch(r'"[^"]*"', sent[0]) else sent[0]  # the draft quotes them, many clients do not
    if len(sent) > 1 or not _KEY.fullmatch(key):
        raise RequestError(
            f"{HEADER} must come once, of 1 to 255 printable characters without spaces or quotes.", HEADER
        )
    shown = hashlib.sha256(headers.get("authorization", "").partition(" ")[2].strip().encode()).digest()
    said = body.model_dump(exclude=_FREE) | {"llmd": body.llmd and body.llmd.model_dump(exclude={"deadline_ms"})}
    asked = json.dumps([type(body).__name__, said], sort_keys=True)
    return Once(hashlib.sha256(_TAG + shown + key.encode()).digest(), hashlib.sha256(asked.encode()).digest())
