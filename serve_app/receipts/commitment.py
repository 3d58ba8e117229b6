"""What a receipt is about: one hash for a request, and the key of its noise.

The commitment hides the prompt behind the ingress's salt and still opens to exactly one request; the request
hash adds the client's nonce, so that no receipt made before the client chose it can answer it.
Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Literal

from serve_app.messages.request import NONCE_BYTES, Assurance, GenerationRequest, Sampling
from serve_app.receipts.rows import ids_root
from shard_tools import canonical
from shard_tools.cid import Cid

Freshness = Literal["client-nonce", "seed", "none"]

SAMPLING_KEY_BYTES = 8  # Philox4x32 takes two words

_COMMITMENT_TAG = b"llmd.commitment.v1\0"
_LEVEL_TAG = b"llmd.commitment.v2\0"  # of a request that asked for more than signatures
_REQUEST_TAG = b"llmd.request.v1\0"
_SAMPLING_TAG = b"llmd.sampling.v1"


def commitment(
    manifest: Cid,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    salt: bytes,
    assurance: Assurance = "signed",
) -> bytes:
    """32 bytes that open to these values only, and tell nothing of them without the salt."""
    said: dict[str, canonical.Value] = {
        "manifest": manifest,
        "prompt": ids_root(manifest, prompt_ids),
        "max": max_tokens,
        "sampling": sampling.to_value(),
        "stop": list(stop_ids),
        "salt": salt,
    }
    if assurance == "signed":
        return hashlib.sha256(_COMMITMENT_TAG + canonical.encode(said)).digest()
    return hashlib.sha256(_LEVEL_TAG + canonical.encode(said | {"assurance": assurance})).digest()


def bind(client_nonce: bytes, committed: bytes) -> bytes:
    """32 bytes: the request hash. The commitment has a fixed length, so the nonce may be of any."""
    return hashlib.sha256(_REQUEST_TAG + client_nonce + committed).digest()


def request_hash(request: GenerationRequest) -> bytes:
    """32 bytes: what every statement and the receipt of this request name it by."""
    return bind(
        request.client_nonce,
        commitment(
            request.manifest,
            request.prompt_ids,
            request.max_tokens,
            request.sampling,
            request.stop_ids,
            request.salt,
            request.assurance,
        ),
    )


def freshness_of(client_nonce: bytes, sampling: Sampling) -> Freshness:
    """What shows that a receipt was not made before the client asked.

    "client-nonce": the client's own bytes are in it. "seed": nothing shows it, but the client fixed the noise.
    "none": the nodes chose everything.
    """
    if client_nonce:
        return "client-nonce"
    return "none" if sampling.seed is None else "seed"


def sampling_key(request: GenerationRequest, node_nonce: bytes) -> bytes:
    """8 bytes: the Philox key of this request's noise.

    A seed alone decides, if the client gave one; else both nonces do.
    """
    return noise_key(request.sampling, request.client_nonce, node_nonce)


def noise_key(sampling: Sampling, client_nonce: bytes, node_nonce: bytes) -> bytes:
    """As sampling_key, from the parts that a receipt and its opening carry."""
    assert len(node_nonce) == NONCE_BYTES
    secret = client_nonce + node_nonce if sampling.seed is None else struct.pack("<q", sampling.seed)
    return hmac.digest(secret, _SAMPLING_TAG, "sha256")[:SAMPLING_KEY_BYTES]
