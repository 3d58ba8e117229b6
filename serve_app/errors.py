"""What can go wrong while a model is alive; api/problems.py alone turns these into HTTP.

LlmdError (shard_tools)
├── ConfigError            the configuration cannot be used; nothing was started
├── RequestError           this request can never be served as it is
│   ├── BodyTooLargeError  its bytes exceed what one request may send
│   ├── KeyReusedError     its Idempotency-Key is another request's
│   ├── ContextLengthError the prompt and what was asked for do not fit the model's context
│   └── UnknownModelError  no model of that name is served
├── TakenOverError         the same request came again under its Idempotency-Key, and goes on there
├── OverloadedError        no room now; try again after `retry_after_s`
├── DeadlineError          the time that this request was given is over
├── PipelineError          a stage died, hung or answered nonsense while serving this request
│   ├── NoRoomError        the cluster has no place for a part of the pipeline
│   └── ReplacedError      this pipeline is not coming back: a newer version's, or no other, is in its place
├── MismatchError          two stages disagree about the bytes of this request; holds the Head's signed word
├── ReceiptError           a receipt, statement or registry proves nothing, and why
├── AuditError             what a stage did cannot be judged, and why: no verdict about it
├── ForgedRecordError      rows were shown that are not those a stage signed for: who showed them is at fault
└── ProtocolError          a peer sent bytes that are no message of ours
"""

from __future__ import annotations

from shard_tools.errors import IntegrityError, LlmdError


class ConfigError(LlmdError):
    """The configuration cannot be used; the message names the key and the nearest known one."""


class RequestError(LlmdError):
    """This request can never be served as it is. param: the field of the request at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLargeError(RequestError):
    """The body of a request is larger than is accepted."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request is larger than the {limit_bytes} bytes that are accepted here. Send less.")
        self.limit_bytes = limit_bytes


class ContextLengthError(RequestError):
    """More tokens than the model's context holds. Clients match the opening words of the message."""

    def __init__(self, limit: int, prompt: int, completion: int) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt + completion} tokens ({prompt} in the messages, {completion} in the completion). "
            f"Please reduce the length of the messages or completion.",
            "messages",
        )
        self.limit, self.prompt, self.completion = limit, prompt, completion


class KeyReusedError(RequestError):
    """Another request was sent under the same Idempotency-Key a short while ago."""

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key was used for another request. Send a new key, or the same request.", "Idempotency-Key"
        )


class UnknownModelError(RequestError):
    """No model of that name is served."""

    def __init__(self, asked: str, served: tuple[str, ...]) -> None:
        super().__init__(f"The model {asked!r} does not exist here. Served: {', '.join(served)}.", "model")
        self.asked, self.served = asked, served


class TakenOverError(LlmdError):
    """Another connection has sent the same request under the same Idempotency-Key since, and is answered instead."""

    def __init__(self) -> None:
        super().__init__("The same request came again under this Idempotency-Key; it is answered there.")


class OverloadedError(LlmdError):
    """No room for this request now."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(LlmdError):
    """The time that a request was given is over, and it was cancelled everywhere."""

    def __init__(self) -> None:
        super().__init__("The time that this request was given is over; it was cancelled.")


class PipelineError(LlmdError):
    """The pipeline cannot finish this request; a retry may succeed once it is rebuilt."""


class NoRoomError(PipelineError):
    """The cluster has no place for a part of the pipeline: no free CPUs or GPUs on any node that may be used."""


class ReplacedError(PipelineError):
    """A newer version of the application has taken this one's place, or there are fewer pipelines: it stays away."""


class MismatchError(IntegrityError):
    """Two stages disagree about the bytes that went between them, so the request was ended.

    evidence: the encoded Envelope of the Head's signed error (PROTOCOL.md); empty if it signed none.
    """

    def __init__(self, message: str, evidence: bytes) -> None:
        super().__init__(message)
        self.evidence = evidence


class ReceiptError(IntegrityError):
    """A receipt, statement or registry proves nothing. The message names the part at fault."""


class AuditError(LlmdError):
    """What a stage did cannot be judged: something is missing, or was measured for another case. Blames nobody."""


class ForgedRecordError(IntegrityError):
    """Rows were shown that do not hash to the root they are to open. which: "received" or "sent"."""

    def __init__(self, message: str, which: str) -> None:
        super().__init__(message)
        self.which = which


class ProtocolError(IntegrityError):
    """A peer sent bytes that are no message of ours."""
