"""Every way in which a model at rest can be refused, as one tree.

    LlmdError
    ├── InputError             a person or a file asked for something that cannot be done
    │   └── CheckpointError    a checkpoint lacks a tensor, has two, or has one of the wrong shape
    ├── IntegrityError         bytes are not what they claim to be; never retried with the same bytes
    │   ├── CorruptBlockError  bytes that do not hash to the name asked for
    │   ├── FormatError        bytes that are not the one canonical form of anything
    │   ├── ManifestError      a manifest that describes no whole model
    │   ├── SignatureError     nobody trusted signed this
    │   ├── ExpiredError       it was signed for a time that is over
    │   └── RollbackError      a newer one was seen before
    ├── NotFoundError          a block or a name that the store does not hold
    │   └── UnavailableError   a block that none of several sources gave; says what each of them said
    └── UnreachableError       a source does not answer, or not in time, or in another language

Messages say what was asked, what came, who said it and what to do.
"""

from __future__ import annotations


class LlmdError(Exception):
    """Root of every error this project raises on purpose."""


class InputError(LlmdError):
    """What was asked for cannot be done; nothing was changed."""


class CheckpointError(InputError):
    """A checkpoint is not a whole model of its own configuration."""


class IntegrityError(LlmdError):
    """Bytes are not what they claim to be."""


class CorruptBlockError(IntegrityError):
    """A store answered with bytes that do not hash to the name asked for."""

    def __init__(self, asked: object, got: object, store: str) -> None:
        super().__init__(
            f"{store} answered block {asked} with the bytes of {got}: they were altered or cut short. "
            f"Delete that block there and fetch it again."
        )
        self.asked, self.got, self.store = asked, got, store


class FormatError(IntegrityError):
    """Bytes are not the canonical form of what they should be."""


class ManifestError(IntegrityError):
    """A manifest does not describe exactly one whole model."""


class SignatureError(IntegrityError):
    """A signature is absent, wrong, or made by a key that is not trusted."""


class ExpiredError(IntegrityError):
    """A release was signed for a time that is over."""


class RollbackError(IntegrityError):
    """A release is older than one that was seen before, or contradicts it."""


class NotFoundError(LlmdError):
    """A block or a name is not there."""

    def __init__(self, what: str, where: str, hint: str = "") -> None:
        super().__init__(f"{what} is not in {where}." + (f" {hint}" if hint else ""))
        self.what, self.where = what, where


class UnavailableError(NotFoundError):
    """None of several sources gave a block."""

    def __init__(self, what: str, answers: tuple[tuple[str, str], ...], hint: str = "") -> None:
        """answers: of each source asked, its label and what it said."""
        said = "; ".join(f"{label}: {text}" for label, text in answers) or "no source is configured"
        super().__init__(what, f"any of {len(answers)} sources ({said})", hint)
        self.answers = answers


class UnreachableError(LlmdError):
    """A source did not answer as it should; what it holds is unknown."""

    def __init__(self, source: str, said: str) -> None:
        super().__init__(f"{source} {said}")
        self.source, self.said = source, said
