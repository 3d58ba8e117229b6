"""What crosses from the ingress to the Head: token ids and integers, no text.

Laws: `decode(encode(x)) == x` for each type here. All byte forms are canonical DAG-CBOR.
Sampling is said in integers so that a receipt can commit to it and an auditor can repeat it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal, NewType

from serve_app.errors import RequestError
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid

RequestId = NewType("RequestId", str)
FinishReason = Literal["stop", "length", "cancelled", "error"]

MICRO = 1_000_000
MAX_TOKENS = 1 << 20  # of prompt or completion: above any context length served today
MAX_VOCAB = 1 << 24
MAX_REQUEST_BYTES = 8 << 20
NONCE_BYTES = 32
MAX_PRIORITY = 4  # levels above and below the usual 0
MAX_CACHE_SALT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Order: temperature, top-k, top-p, then Gumbel-max over what is left.

    temperature_micro 0 is greedy (lowest id wins a tie). top_k 0 and top_p_micro 1_000_000 are off.
    seed None: the noise is keyed by the client's and the node's nonces (PROTOCOL.md).
    """

    temperature_micro: int = MICRO
    top_k: int = 0
    top_p_micro: int = MICRO
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature_micro, 0, 2 * MICRO),
            ("top_k", self.top_k, 0, MAX_VOCAB),
            ("top_p", self.top_p_micro, 1, MICRO),
            ("seed", self.seed or 0, -(1 << 63), (1 << 63) - 1),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name} is out of range: {value} not in [{low}, {high}]", name)

    def to_value(self) -> Value:
        return {"t": self.temperature_micro, "k": self.top_k, "p": self.top_p_micro, "seed": self.seed}

    @classmethod
    def from_value(cls, value: Value) -> Sampling:
        with Fields(value, "sampling") as f:
            seed = f.optional_integer("seed", -(1 << 63), (1 << 63) - 1)
            return cls(f.integer("t", 0, 2 * MICRO), f.integer("k", 0, MAX_VOCAB), f.integer("p", 1, MICRO), seed)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request as the Head sees it."""

    id: RequestId
    manifest: Cid  # the model
    prompt_ids: tuple[int, ...]
    max_tokens: int  # of completion
    sampling: Sampling
    stop_ids: tuple[int, ...]  # a token of these ends the completion (end of turn); sorted
    client_nonce: bytes  # 32 bytes chosen by the client; empty: the receipt then says "no freshness"
    salt: bytes  # 32 random bytes of the ingress, so that the commitment hides a guessable prompt
    priority: int = 0  # the larger goes first, as if it had come earlier (scheduling/seats.py)
    cache_salt: bytes = b""  # requests share computed beginnings only with those of the same salt

    def encode(self) -> bytes:
        return canonical.encode(
            {
                "id": self.id,
                "manifest": self.manifest,
                "prompt": list(self.prompt_ids),
                "max": self.max_tokens,
                "sampling": self.sampling.to_value(),
                "stop": list(self.stop_ids),
                "nonce": self.client_nonce,
                "salt": self.salt,
                "priority": self.priority,
                "cache_salt": self.cache_salt,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> GenerationRequest:
        with Fields(canonical.decode(data, max_bytes=MAX_REQUEST_BYTES), "request") as f:
            return cls(
                RequestId(f.text("id", 100)),
                f.link("manifest"),
                f.integers("prompt", MAX_TOKENS, 0, MAX_VOCAB),
                f.integer("max", 1, MAX_TOKENS),
                Sampling.from_value(f.any("sampling")),
                f.integers("stop", 64, 0, MAX_VOCAB),
                f.data("nonce", 0, NONCE_BYTES),
                f.data("salt", NONCE_BYTES, NONCE_BYTES),
                f.integer("priority", -MAX_PRIORITY, MAX_PRIORITY),
                f.data("cache_salt", 0, MAX_CACHE_SALT_BYTES),
            )


def fresh_salt() -> bytes:
    """32 unpredictable bytes."""
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Further tokens of one request, in order."""

    id: RequestId
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The request ended; nothing follows. receipt: the encoded bundle (receipts/receipt.py)."""

    id: RequestId
    reason: FinishReason
    receipt: bytes


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The request cannot be finished; nothing follows. message is for the client.

    evidence: for kind "integrity", the encoded Envelope of the Head's signed error (PROTOCOL.md).
    """

    id: RequestId
    kind: Literal["request", "overloaded", "pipeline", "integrity"]
    message: str
    evidence: bytes = b""


Event = TokensEvent | FinishedEvent | FailedEvent
