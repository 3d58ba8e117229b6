"""What crosses from the ingress to the Head: token ids and integers, no text.

Laws: `decode(encode(x)) == x` for each type here. All byte forms are canonical DAG-CBOR.
Sampling is said in integers so that a receipt can commit to it and an auditor can repeat it.
"""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass
from typing import Literal, NewType

from serve_app.errors import RequestError
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError

RequestId = NewType("RequestId", str)
FinishReason = Literal["stop", "length", "cancelled", "error"]
FailureKind = Literal["request", "key_reused", "taken_over", "overloaded", "deadline", "pipeline", "integrity", "lost"]
# signed: may be audited, at the operator's rate. audited: one stage of it certainly is. exact: the same, bit by bit.
Assurance = Literal["signed", "audited", "exact"]
ASSURANCES: tuple[Assurance, ...] = ("signed", "audited", "exact")

MICRO = 1_000_000
MAX_TOKENS = 1 << 20  # of prompt or completion: above any context length served today
MAX_VOCAB = 1 << 24
MAX_PENALTY_MICRO = 2 * MICRO  # presence and frequency: OpenAI's range
MIN_REPETITION_MICRO, MAX_REPETITION_MICRO = MICRO // 100, 10 * MICRO  # servers of it ask for above 0; useful is 1 to 2
MAX_BIASES, MAX_BIAS_MICRO = 300, 100 * MICRO  # OpenAI's
MAX_REQUEST_BYTES = 8 << 20
NONCE_BYTES = 32
_DIGEST_BYTES = 32
MAX_PRIORITY = 4  # levels above and below the usual 0
MAX_CACHE_SALT_BYTES = 64
MAX_TIMEOUT_MS = 86_400_000  # a day; what is to take longer has no deadline


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Order: logit bias, penalties, temperature, top-k, top-p, min-p, then Gumbel-max.

    temperature_micro 0 is greedy (lowest id wins a tie). top_k 0, top_p_micro 1_000_000, min_p_micro 0, penalties 0,
    repetition_micro 1_000_000 and no bias are off, and are not written: a request without them says nothing of them.
    seed None: the noise is keyed by the client's and the node's nonces. Each step: PROTOCOL.md, "Sampling".
    """

    temperature_micro: int = MICRO
    top_k: int = 0
    top_p_micro: int = MICRO
    seed: int | None = None
    min_p_micro: int = 0
    presence_micro: int = 0  # taken off once from what was drawn before
    frequency_micro: int = 0  # taken off each time it was drawn before
    repetition_micro: int = MICRO  # divides what prompt or answer hold already
    logit_bias: tuple[tuple[int, int], ...] = ()  # (token id, millionths added), by rising id, none of them 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature_micro, 0, 2 * MICRO),
            ("top_k", self.top_k, 0, MAX_VOCAB),
            ("top_p", self.top_p_micro, 1, MICRO),
            ("seed", self.seed or 0, -(1 << 63), (1 << 63) - 1),
            ("min_p", self.min_p_micro, 0, MICRO),
            ("presence_penalty", self.presence_micro, -MAX_PENALTY_MICRO, MAX_PENALTY_MICRO),
            ("frequency_penalty", self.frequency_micro, -MAX_PENALTY_MICRO, MAX_PENALTY_MICRO),
            ("repetition_penalty", self.repetition_micro, MIN_REPETITION_MICRO, MAX_REPETITION_MICRO),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name} is out of range: {value} not in [{low}, {high}]", name)
        wrong = _wrong_bias(self.logit_bias)
        if wrong is not None:
            raise RequestError(f"logit_bias: {wrong}", "logit_bias")

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return bool(self.presence_micro or self.frequency_micro or self.repetition_micro != MICRO)

    @property
    def plain(self) -> bool:
        """Whether temperature, top-k, top-p and seed say it all."""
        return not (self.min_p_micro or self.penalises or self.logit_bias)

    def to_value(self) -> Value:
        said: dict[str, Value] = {
            "t": self.temperature_micro,
            "k": self.top_k,
            "p": self.top_p_micro,
            "seed": self.seed,
        }
        said |= {name: value for name, neutral, *_ in _OPTIONAL if (value := getattr(self, name)) != neutral}
        if self.logit_bias:
            said["logit_bias"] = [list(pair) for pair in self.logit_bias]
        return said

    @classmethod
    def from_value(cls, value: Value) -> Sampling:
        """Raises FormatError, also where an optional field says what its absence says."""
        with Fields(value, "sampling") as f:
            seed = f.optional_integer("seed", -(1 << 63), (1 << 63) - 1)
            plain = f.integer("t", 0, 2 * MICRO), f.integer("k", 0, MAX_VOCAB), f.integer("p", 1, MICRO), seed
            controls = {name: _optional(f, name, *bounds) for name, *bounds in _OPTIONAL}
            return cls(*plain, **controls, logit_bias=_bias_pairs(f) if f.has("logit_bias") else ())


# Fields that are left out where they are neutral: name, neutral, low, high.
_OPTIONAL = (
    ("min_p_micro", 0, 0, MICRO),
    ("presence_micro", 0, -MAX_PENALTY_MICRO, MAX_PENALTY_MICRO),
    ("frequency_micro", 0, -MAX_PENALTY_MICRO, MAX_PENALTY_MICRO),
    ("repetition_micro", MICRO, MIN_REPETITION_MICRO, MAX_REPETITION_MICRO),
)


def _optional(f: Fields, name: str, neutral: int, low: int, high: int) -> int:
    if not f.has(name):
        return neutral
    value = f.integer(name, low, high)
    if value == neutral:
        raise FormatError(f"sampling.{name}: {neutral} is what its absence says")
    return value


def _bias_pairs(f: Fields) -> tuple[tuple[int, int], ...]:
    pairs: list[tuple[int, int]] = []
    for item in f.items("logit_bias", MAX_BIASES):
        if not isinstance(item, list) or len(item) != 2 or any(type(n) is not int for n in item):
            raise FormatError("sampling.logit_bias: not a list of pairs of integers")
        pairs.append((item[0], item[1]))  # type: ignore[arg-type]
    wrong = _wrong_bias(tuple(pairs)) if pairs else "it is empty, which its absence says"
    if wrong is not None:
        raise FormatError(f"sampling.logit_bias: {wrong}")
    return tuple(pairs)


def _wrong_bias(pairs: tuple[tuple[int, int], ...]) -> str | None:
    """What is wrong with a logit bias, or None."""
    if len(pairs) > MAX_BIASES:
        return f"{len(pairs)} tokens, more than {MAX_BIASES}"
    for id, micro in pairs:
        if not 0 <= id < MAX_VOCAB or not 0 < abs(micro) <= MAX_BIAS_MICRO:
            return f"{micro} millionths for token {id} are out of range, or nothing"
    if any(a >= b for (a, _), (b, _) in itertools.pairwise(pairs)):
        return "token ids that do not rise"
    return None


@dataclass(frozen=True, slots=True)
class Once:
    """What shows a retry to be one, as SHA-256 digests.

    key: of whose it is and of its Idempotency-Key; asked: of all that decides the answer.
    """

    key: bytes
    asked: bytes


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
    timeout_ms: int | None = None  # it may still take so long from when this is handed on; then it is cancelled
    once: Once | None = None  # None: sent again it is another request
    assurance: Assurance = "signed"

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
                "timeout_ms": self.timeout_ms,
                "once": self.once.key + self.once.asked if self.once else b"",
                "assurance": self.assurance,
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
                f.optional_integer("timeout_ms", 1, MAX_TIMEOUT_MS),
                _once(f.data("once", 0, 2 * _DIGEST_BYTES)),
                assurance_of(f.text("assurance", 20)),
            )


def _once(digests: bytes) -> Once | None:
    if len(digests) not in (0, 2 * _DIGEST_BYTES):
        raise FormatError(f"request.once: {len(digests)} bytes, where two digests are expected, or nothing")
    return Once(digests[:_DIGEST_BYTES], digests[_DIGEST_BYTES:]) if digests else None


def assurance_of(text: str) -> Assurance:
    """The level of that name. Raises FormatError."""
    found = next((level for level in ASSURANCES if level == text), None)
    if found is None:
        raise FormatError(f"assurance: {text!r} is none of {', '.join(ASSURANCES)}")
    return found


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

    kind "lost": the pipeline is given up, and another one can go on with the request (events.Begun).
    evidence: for kind "integrity", the encoded Envelope of the Head's signed error (PROTOCOL.md).
    """

    id: RequestId
    kind: FailureKind
    message: str
    evidence: bytes = b""


Event = TokensEvent | FinishedEvent | FailedEvent
