"""The request a Head asks of its own pipeline before it says that it is ready."""

from __future__ import annotations

from serve_app.messages.request import GenerationRequest, RequestId, Sampling, fresh_salt
from shard_tools.cid import Cid

WARM_UP_ID = RequestId("warm-up")


def warm_up_request(manifest: Cid) -> GenerationRequest:
    """Two tokens after one: a prefill, a decode, a receipt. Only when all three came is a pipeline ready."""
    return GenerationRequest(
        id=WARM_UP_ID,
        manifest=manifest,
        prompt_ids=(0,),
        max_tokens=2,
        sampling=Sampling(temperature_micro=0),
        stop_ids=(),
        client_nonce=b"",
        salt=fresh_salt(),
    )
