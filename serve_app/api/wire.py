"""What a client may send, bounded and typed. The bytes of a body become one of the two models here or a RequestError.

Fractions become integers: temperature, top_p, min_p, penalties and biases are taken in millionths of the decimal
number that the client wrote, halves rounded to even, so a temperature below 0.0000005 is greedy.
"""

from __future__ import annotations

import json
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from serve_app.api.openai_fields import acted_on
from serve_app.errors import RequestError
from serve_app.messages.request import (
    MAX_BIASES,
    MAX_CACHE_SALT_BYTES,
    MAX_PRIORITY,
    MAX_TIMEOUT_MS,
    MAX_TOKENS,
    MAX_VOCAB,
    MICRO,
    Assurance,
    Sampling,
    assurance_of,
)
from shard_tools.errors import FormatError

MAX_MESSAGES = 2048
MAX_PARTS = 256  # of one message
MAX_TEXT_CHARS = 8 << 20  # the body's own limit comes first; this one holds when that is raised

_LEVEL = "llmd.assurance"
_Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Id = Annotated[int, Field(ge=0, lt=MAX_VOCAB)]
_Ids = Annotated[list[_Id], Field(min_length=1, max_length=MAX_TOKENS)]
_Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,7})$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Nothing = Annotated[list[Any], Field(max_length=0)] | None
B = TypeVar("B", bound=BaseModel)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Closed):
    """A piece of a message. Only text is understood."""

    type: Literal["text"]
    text: _Text


class Message(_Closed):
    """One turn. The fields after `name` are those that come back with an answer; they may only be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nothing = None
    annotations: _Nothing = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":  # an assistant's may be null, as it was received
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, str]:
        """As a chat template takes it: parts joined with nothing between, `developer` under its older name, system."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return turn | ({"name": self.name} if self.name else {})


class StreamOptions(_Closed):
    """include_obfuscation is accepted and has no effect: chunks carry no padding."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(_Closed):
    """Our own part of a request, under `llmd`. nonce: 32 bytes in hex that make the receipt fresh.

    assurance: the level that is to back the answer. priority: the larger goes first. cache_salt: only requests with the
    same one see from the time to the first token that this beginning was computed before. deadline_ms: `timeout` in
    milliseconds.
    """

    nonce: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    assurance: Annotated[str, Field(max_length=20)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS)] | None = None
    cache_salt: Annotated[str, Field(pattern="^[!-~]+$", max_length=MAX_CACHE_SALT_BYTES)] | None = None


class _Body(_Closed):
    """What both endpoints share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_VOCAB)] = 0  # 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    logit_bias: Annotated[dict[_TokenId, _Bias], Field(max_length=MAX_BIASES)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] = Field(default_factory=list)
    timeout: Annotated[float, Field(ge=0.001, le=MAX_TIMEOUT_MS / 1000)] | None = None  # seconds
    stream: bool = False
    stream_options: StreamOptions | None = None
    llmd: Extension | None = None

    def sampling(self) -> Sampling:
        """How tokens are drawn, in integers."""
        biases = sorted((int(id), micro(bias)) for id, bias in self.logit_bias.items())
        return Sampling(
            micro(self.temperature),
            self.top_k,
            micro(self.top_p),
            self.seed,
            micro(self.min_p),
            micro(self.presence_penalty),
            micro(self.frequency_penalty),
            micro(self.repetition_penalty),
            tuple((id, bias) for id, bias in biases if bias),
        )

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def asked_tokens(self) -> int | None:
        """The completion's longest length, or None where the client leaves it to us. Raises RequestError."""
        both = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(both) > 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}: "
                f"they mean the same here; send one of them.",
                "max_tokens",
            )
        return both.pop() if both else None

    def timeout_ms(self) -> int | None:
        """How long it may take from when it has come; None: as long as it needs. Raises RequestError."""
        deadline_ms = self.llmd.deadline_ms if self.llmd else None
        if self.timeout is not None and deadline_ms is not None:
            raise RequestError("timeout and llmd.deadline_ms mean the same here; send one of them.", "timeout")
        return deadline_ms if self.timeout is None else round(self.timeout * 1000)

    def nonce(self) -> bytes:
        """The client's nonce, or empty."""
        return bytes.fromhex(self.llmd.nonce) if self.llmd and self.llmd.nonce else b""

    def assurance(self, header: str | None) -> Assurance:
        """The level that body or header (X-LLMD-Assurance) asks for. Raises RequestError."""
        said = {text for text in (header, self.llmd.assurance if self.llmd else None) if text is not None}
        if len(said) > 1:
            raise RequestError("llmd.assurance and the header X-LLMD-Assurance name two levels; send one.", _LEVEL)
        level = said.pop() if said else "signed"
        try:
            return assurance_of(level[:80])
        except FormatError as e:
            raise RequestError(f"{e}.", _LEVEL) from e

    def priority(self) -> int:
        """How urgent it is; 0 is usual."""
        return self.llmd.priority if self.llmd else 0

    def cache_salt(self) -> bytes:
        """The client's salt for shared beginnings, or empty."""
        return self.llmd.cache_salt.encode() if self.llmd and self.llmd.cache_salt else b""

    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class CompletionBody(_Body):
    """POST /v1/completions. A list may hold one prompt only."""

    prompt: _Text | _Ids | Annotated[list[_Text], Field(max_length=1)] | Annotated[list[_Ids], Field(max_length=1)]

    def one_prompt(self) -> str | list[int]:
        """The prompt, out of its list if it came in one. Raises RequestError for an empty one."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if not prompt:
            raise RequestError("prompt is empty; send text or token ids.", "prompt")
        return prompt  # type: ignore[return-value]  # a list whose first item is an integer holds integers only


def parse(body: bytes, kind: type[B]) -> B:
    """The request in these bytes. Raises RequestError that names the field at fault."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise RequestError(f"The body is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, not {_shown(value)}.")
    try:
        return kind.model_validate(acted_on(value, kind.model_fields))
    except ValidationError as e:
        raise _refusal(e) from e


def micro(number: float) -> int:
    """A decimal number in millionths, halves to even."""
    return int((Decimal(repr(number)) * MICRO).to_integral_value(ROUND_HALF_EVEN))


def _refusal(error: ValidationError) -> RequestError:
    """One message out of pydantic's list: what is wrong with the first field at fault."""
    problems = error.errors(include_url=False, include_context=False)
    param = str(problems[0]["loc"][0])
    said = []
    for p in problems[:8]:
        if p["loc"][0] == problems[0]["loc"][0]:
            place = ".".join(str(part) for part in p["loc"] if isinstance(part, int) or part.isidentifier())
            found = "" if p["type"] == "missing" else f" (found {_shown(p['input'])})"
            said.append(f"{place}: {p['msg'].removeprefix('Value error, ')}{found}")
    return RequestError("; ".join(dict.fromkeys(said)) + ".", param)


def _shown(value: object) -> str:
    text = json.dumps(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
