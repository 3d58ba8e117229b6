"""One request of a Head: what it has told of it, and what the stages say they did for it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.errors import DeadlineError
from serve_app.messages.events import Begun
from serve_app.messages.request import Event, FailedEvent, FinishReason, GenerationRequest, RequestId
from serve_app.messages.step import Roots
from serve_app.pipeline.facts import PipelineFacts
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.commitment import sampling_key
from serve_app.receipts.identity import Session
from serve_app.receipts.issue import issue
from serve_app.receipts.rows import ids_root
from serve_app.scheduling.scheduler import Scheduler
from serve_app.scheduling.sequence import Ticket
from shard_tools.canonical import Value
from shard_tools.cid import Cid
from shard_tools.signing import Envelope

ATTEMPTS = 1 << 10  # of one Head: those of the next begin above, so that no two of a request have one number


@dataclass(slots=True)
class Running:
    """What the Head keeps of it until its receipt is out."""

    request: GenerationRequest
    sink: Callable[[Event], None]
    hash: bytes
    node_nonce: bytes
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    attempt: int = 0  # how often it had begun anew when reason was known
    ended_s: float | None = None  # on the monotonic clock: when reason was known
    roots: dict[int, Roots] = field(default_factory=dict)
    statements: dict[int, Envelope] = field(default_factory=dict)
    resumed_at: int = -1  # tokens it had drawn when stages were lost the last time
    stalls: int = 0
    alarm: asyncio.TimerHandle | None = None  # goes off at its deadline
    overdue: bool = False  # it has

    def go_on(self, begun: Begun) -> None:
        """Behind what it had drawn with another Head. reason: if that is all."""
        self.tokens, self.attempt = list(begun.drawn), begun.times * ATTEMPTS
        if begun.stopped or (begun.drawn and begun.drawn[-1] in self.request.stop_ids):
            self.reason = "stop"
        elif len(begun.drawn) == self.request.max_tokens:
            self.reason = "length"


def ticket_of(seq: int, running: Running) -> Ticket:
    """As the scheduler needs to know the request, which may have drawn already."""
    request = running.request
    return Ticket(
        seq,
        running.hash,
        request.prompt_ids,
        request.max_tokens,
        request.sampling,
        sampling_key(request, running.node_nonce),
        frozenset(request.stop_ids),
        request.priority,
        # An audit needs every row from the first on, and rows of a shared beginning may not be kept any more.
        request.cache_salt if request.assurance == "signed" else running.hash,
        tuple(running.tokens),
        running.reason if running.reason in ("stop", "length") else None,
        running.attempt,
    )


def bundle_of(running: Running, facts: PipelineFacts, session: Session) -> Bundle:
    """Its receipt, once every stage has signed. Raises LlmdError if what they signed does not fit."""
    assert running.reason in ("stop", "length")
    return issue(
        running.request,
        running.tokens,
        running.reason,
        statements=[running.statements[i] for i in range(facts.n_stages)],
        certificates=facts.certificates,
        registry=facts.registry,
        session=session,
        node_nonce=running.node_nonce,
        now_ms=time.time_ns() // 1_000_000,
        attempt=running.attempt,
    )


def too_late(id: RequestId) -> FailedEvent:
    """Its time is over."""
    return FailedEvent(id, "deadline", str(DeadlineError()))


def mismatch(manifest: Cid, running: Running, chain: Sequence[Roots]) -> str | None:
    """What is wrong with the stages' roots, or None. Nothing is signed before this is None."""
    fed = (*running.request.prompt_ids, *running.tokens[:-1])
    if chain[0].in_root != ids_root(manifest, fed):
        return "stage 0 did not receive the tokens of this request"
    for before, after in itertools.pairwise(chain):
        if before.out_root != after.in_root:
            return f"stage {after.stage} received other rows than stage {before.stage} sent"
    short = next((r for r in chain if r.rows != len(fed)), None)
    return None if short is None else f"stage {short.stage} hashed {short.rows} rows of {len(fed)}"


def load_of(scheduler: Scheduler) -> dict[str, Value]:
    """What runs, what waits, and what it has come to so far, for people."""
    return {
        "running": scheduler.running,
        "waiting": scheduler.waiting,
        "free_pages": scheduler.free_pages,
        "steps_in_flight": scheduler.in_flight,
        "rows_abandoned": scheduler.rows_abandoned,
        "preemptions": scheduler.preemptions,
        "prompt_tokens": scheduler.prompt_tokens,
        "cached_tokens": scheduler.cached_tokens,
        "guesses": scheduler.guesses,
        "guesses_right": scheduler.guesses_right,
    }
