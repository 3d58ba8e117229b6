"""The seam between a stage and whatever computes its layers.

An engine holds the weights of one contiguous range of layers and the KV of open sequences. It is told
what to run by a plan and never decides; it knows nothing of requests, scheduling, sockets, hashes or Ray.
Bytes go in and out so that what is hashed is exactly what is computed from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from serve_app.messages.step import StepPlan

ActivationDtype = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "fp8"]  # of keys and values in pages; auto: that of the activations
DeviceName = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What one needs to know to repeat this engine's work and to plan for it."""

    description: str  # library versions, device, dtype, attention: goes into the signed statements
    device: str
    dtype: ActivationDtype
    hidden_size: int
    parameter_bytes: int
    kv_page_bytes: int  # of one page in all layers of this engine
    memory_bytes: int  # free for KV on the device, a snapshot


class Digests(Protocol):
    """Hashes of a step's rows that the engine made itself."""

    def wait(self) -> tuple[memoryview, memoryview]:
        """32 bytes a row, of those that came in and of those that went out."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step took in and gave.

    received: the rows as they were computed from, which differ from those sent only where an id was DRAWN_LAST.
    hidden: the rows leaving the last layer, little-endian, in row order, or a reference to them (LendsRows); empty if
    `hash_rows` said that nobody needs them. tokens: what was drawn, as many as each span asked for, in the order of
    rows (StepPlan.drawn_rows); empty on a stage without the head. Nobody writes to either buffer any more.
    digests: None unless `hash_rows` was agreed to. kept: the rows that came in and those that left, on the host, where
    `keep_rows` asked for them; else None, and both are `received` and `hidden`.
    """

    received: memoryview
    hidden: memoryview
    tokens: tuple[int, ...]
    digests: Digests | None = None
    kept: tuple[memoryview, memoryview] | None = None


class Launched(Protocol):
    """A step under way."""

    def result(self) -> StepOutput:
        """Wait for it. Raises PipelineError if what it computed is of no use; later steps are not touched by that."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that ended before `launch` returned: of an engine that has nothing to overlap."""

    output: StepOutput

    def result(self) -> StepOutput:
        """Its output."""
        return self.output


class Engine(Protocol):
    """Computes one range of layers."""

    @property
    def profile(self) -> EngineProfile:
        """Facts about this engine; constant once it is built."""

    def reserve(self, n_pages: int, max_sequences: int) -> None:
        """Make room for this many KV pages and sequences open at a time. Called once, before the first step."""

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        """Asks for the SHA-256 of each row behind one of these 56-byte prefixes and its position as a u64.

        Called once, after `reserve` and before the first step; it may take as long as an engine needs to be ready for
        steps. hand_on: the rows are needed as well. Returns False, and changes nothing, if rows are on the host anyway:
        who wants hashes makes them from the bytes.
        """

    def launch(self, plan: StepPlan, rows: memoryview) -> Launched:
        """Begin one step: open, compute, draw, close, in this order. Steps take effect in the order of launching.

        rows: token ids (uint32) if this range holds the embedding, else activations. Raises ProtocolError
        for a plan that does not fit what is open; the engine is then as before the call. A span behind one with guesses
        (DRAW_EACH) may begin as many rows further back as there were guesses; what it runs replaces what ran there.
        """


@runtime_checkable
class KeepsRows(Protocol):
    """Of an engine that hashes rows itself, so that they need not come to the host."""

    def keep_rows(self) -> None:
        """They come nevertheless, as StepOutput.kept: an auditor may ask for them. Called before the first step."""


BoxKind = Literal["rows", "tokens"]


@runtime_checkable
class LendsRows(Protocol):
    """Of an engine from which rows, or the tokens of the last stage to the first, go to a neighbour past the host.

    The receiver offers an inbox, the sender tries it, the receiver looks whether something came, and the sender uses it
    from then on. All that after hash_rows and before the first step; only engines that hash rows themselves can do it.
    Where rows go that way, what a step hands on is a reference, known as soon as the step is launched (`lent`).
    """

    def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        """What a sender needs to know; None if it cannot be done here. places: steps whose rows can lie there."""

    def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        """Whether this engine reaches what is offered; a probe is then in it."""

    def got_probe(self, kind: BoxKind) -> bool:
        """Whether the probe is there. With tokens: ids that the Head does not know are taken from now on."""

    def use_outbox(self, kind: BoxKind) -> None:
        """Hand on by the neighbour's inbox from now on."""

    def release_boxes(self) -> None:
        """The neighbours are lost: steps that wait for something of theirs end, with whatever lies in the inbox."""

    def drop_boxes(self) -> None:
        """Everything goes through the host again, until boxes are offered anew. No step is under way."""


@runtime_checkable
class Lent(Protocol):
    """A step under way, of an engine that lends rows."""

    @property
    def lent(self) -> bytes | None:
        """What stands for its rows on their way, to be sent at once; None if they must be waited for."""
