"""A request hash stands for one request, and a noise key for one choice of seed or nonces."""

from __future__ import annotations

import hashlib
import hmac
import struct

from serve_app.messages.request import Sampling
from serve_app.receipts.commitment import request_hash, sampling_key
from shard_tools.cid import Cid, Codec
from tests.serve_app.receipts.pipeline_of_three import NODE_NONCE, NONCE, a_request


def test_every_field_but_the_id_changes_the_request_hash() -> None:
    """The id is a label for logs; whatever decides the answer, and nonce and salt, is bound."""
    variants = [
        a_request(),
        a_request(manifest=Cid.of(Codec.DAG_CBOR, b"other")),
        a_request(prompt_ids=(5, 6, 8, 7)),
        a_request(max_tokens=17),
        a_request(sampling=Sampling(top_k=21)),
        a_request(sampling=Sampling(top_k=20, seed=0)),
        a_request(stop_ids=(2, 3)),
        a_request(client_nonce=b""),
        a_request(salt=bytes(32)),
        a_request(assurance="audited"),
        a_request(assurance="exact"),
    ]
    assert len({request_hash(request) for request in variants}) == len(variants)
    assert request_hash(a_request(id="another")) == request_hash(a_request())


def test_sampling_key_is_that_of_protocol_md() -> None:
    """First 8 bytes of HMAC-SHA256 under the seed alone, or under both nonces."""
    seeded = a_request(sampling=Sampling(seed=-7))
    expected = hmac.new(struct.pack("<q", -7), b"llmd.sampling.v1", hashlib.sha256).digest()[:8]
    assert sampling_key(seeded, NODE_NONCE) == sampling_key(seeded, bytes(32)) == expected
    expected = hmac.new(NONCE + NODE_NONCE, b"llmd.sampling.v1", hashlib.sha256).digest()[:8]
    assert sampling_key(a_request(), NODE_NONCE) == expected
    assert sampling_key(a_request(), bytes(32)) != expected
