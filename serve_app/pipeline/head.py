"""The Head of one pipeline: the only owner of its requests, from submission to receipt.

One request: submit -> scheduler -> plans down the stages -> tokens back -> its rows' roots from every stage,
compared -> the stages sign -> the receipt. All of it in one event loop, nothing shared; knows neither Ray, HTTP,
text nor tensors. Stages answer through `deliver`.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.errors import ContextLengthError, PipelineError, ProtocolError, RequestError
from serve_app.messages.request import (
    NONCE_BYTES,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    RequestId,
    TokensEvent,
)
from serve_app.messages.step import Fault, Reply, Roots, Signed, StepPlan, StepResult, closing_plan, decode_reply
from serve_app.receipts import rows_native
from serve_app.receipts.commitment import request_hash, sampling_key
from serve_app.receipts.identity import Session
from serve_app.receipts.issue import issue
from serve_app.receipts.rows import PAGE_ROWS, ids_root
from serve_app.scheduling.scheduler import Committed, Scheduler, Ticket, flights_ahead
from serve_app.transport.edge import Edge
from shard_tools import canonical
from shard_tools.canonical import Value
from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope

_log = logging.getLogger(__name__)
EXPIRY_MARGIN_S = 30  # a receipt signed later than this before the end might be refused by a clock that runs ahead
ERROR_TYPE = "application/vnd.llmd.error.v1+dag-cbor"

Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class PipelineFacts:
    """What a Head must know of the pipeline it leads."""

    epoch: int
    manifest: Cid
    n_stages: int
    context_length: int  # tokens
    vocab_size: int
    max_flights: int  # steps on their way at a time
    step_timeout_s: float  # a step that takes longer has died: 60 s is ten times a 512-row step on two CPU cores
    certificates: tuple[Envelope, ...]  # of the stages' sessions
    registry: Envelope
    expires_s: int  # Unix time: when the first of registry and session keys runs out


def can_reuse_pages(page_size: int) -> bool:
    """Whether the rows of KV pages of this size can be accounted for without running again; says so if not."""
    if page_size % PAGE_ROWS:
        _log.warning(
            "KV pages of %d tokens are no whole pages of %d hashed rows, so shared prefixes are computed anew: "
            "make pipeline.page_size a multiple of %d",
            page_size,
            PAGE_ROWS,
            PAGE_ROWS,
        )
    return page_size % PAGE_ROWS == 0


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    sink: Sink
    hash: bytes
    node_nonce: bytes
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    attempt: int = 0  # how often it had begun anew when reason was known
    ended_s: float | None = None  # on the monotonic clock: when reason was known
    roots: dict[int, Roots] = field(default_factory=dict)
    statements: dict[int, Envelope] = field(default_factory=dict)


class Head:
    """Leads one pipeline. Every method is called in the event loop it was made for."""

    def __init__(self, facts: PipelineFacts, scheduler: Scheduler, first: Edge, session: Session) -> None:
        rows_native.prepare()
        self._facts, self._scheduler, self._first, self._session = facts, scheduler, first, session
        self._seqs = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._by_id: dict[RequestId, int] = {}
        self._started: dict[int, float] = {}  # step -> when it left
        self._failure: str | None = None
        self._max_flights = facts.max_flights
        self._rows_sent = 0
        self.tokens_drawn = 0
        self.receipts_issued = 0

    @property
    def rows_run(self) -> int:
        """Rows sent down the stages, without those of attempts that were given up."""
        return self._rows_sent - self._scheduler.rows_abandoned

    @property
    def failure(self) -> str | None:
        """Why this pipeline can do no more, or None while it can."""
        return self._failure

    def look_ahead(self) -> None:
        """Tokens go from the last stage to the first by themselves: plan a row behind each that is on its way."""
        self._scheduler.look_ahead(1)
        self._max_flights = flights_ahead(self._facts.n_stages)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Take the request in; its events go to sink, the last one a FinishedEvent or FailedEvent.

        Raises RequestError, OverloadedError, PipelineError; then nothing was taken in.
        """
        if self._failure is not None:
            raise PipelineError(f"the pipeline has failed ({self._failure}) and is being rebuilt; try again soon")
        self._check(request)
        seq, nonce = next(self._seqs), secrets.token_bytes(NONCE_BYTES)
        bound = request_hash(request)
        ticket = Ticket(
            seq,
            bound,
            request.prompt_ids,
            request.max_tokens,
            request.sampling,
            sampling_key(request, nonce),
            frozenset(request.stop_ids),
            request.priority,
            request.cache_salt,
        )
        self._scheduler.admit(ticket)
        self._running[seq] = _Running(request, sink, bound, nonce)
        self._by_id[request.id] = seq
        self._pump()

    def stop(self, id: RequestId, *, keep: bool) -> None:
        """End a request now. keep: what it drew so far counts and is signed; else it is forgotten."""
        seq = self._by_id.get(id)
        if seq is None or self._running[seq].reason is not None:
            return
        ended = self._scheduler.stop(seq, "stop" if keep else "cancelled")
        if ended is not None:
            self._commit(ended)
        self._pump()

    def deliver(self, data: bytes) -> None:
        """Take in one reply of a stage."""
        try:
            reply = decode_reply(data)
        except ProtocolError as e:
            self.fail(f"a stage sent what is no reply: {e}")
            return
        if reply.epoch == self._facts.epoch and self._failure is None:
            drawn = self._take(reply)
            self._pump()  # first: the stages wait for it, and whoever reads tokens does not feel the difference
            for committed in drawn:
                self._commit(committed)

    def watch(self) -> None:
        """Called every second or so: a step or a signature that is overdue means that a stage hangs."""
        if time.time() > self._facts.expires_s - EXPIRY_MARGIN_S:
            # Whatever were signed from here on, no client could verify.
            self.fail("its session keys or registry run out, and it is made anew with fresh ones")
            return
        now = time.monotonic()
        for step, began in self._started.items():
            if now - began > self._facts.step_timeout_s:
                self.fail(f"step {step} took more than {self._facts.step_timeout_s:.0f} s")
                return
        for running in self._running.values():
            if running.ended_s is not None and now - running.ended_s > self._facts.step_timeout_s:
                silent = sorted(set(range(self._facts.n_stages)) - running.statements.keys())
                self.fail(f"stage {silent[0]} signed nothing for {self._facts.step_timeout_s:.0f} s after a request")
                return

    def fail(self, why: str) -> None:
        """The pipeline can do no more: every request ends with an error, nothing waits for ever."""
        if self._failure is None:
            _log.error("pipeline epoch %d failed: %s", self._facts.epoch, why)
            self._failure = why
            for seq in list(self._running):
                self._end(seq, FailedEvent(self._running[seq].request.id, "pipeline", f"the pipeline failed: {why}"))

    def status(self) -> dict[str, Value]:
        """Load and counters, for people."""
        return {
            "epoch": self._facts.epoch,
            "failure": self._failure,
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "free_pages": self._scheduler.free_pages,
            "steps_in_flight": self._scheduler.in_flight,
            "rows_run": self.rows_run,
            "rows_abandoned": self._scheduler.rows_abandoned,
            "preemptions": self._scheduler.preemptions,
            "prompt_tokens": self._scheduler.prompt_tokens,
            "cached_tokens": self._scheduler.cached_tokens,
            "tokens_drawn": self.tokens_drawn,
            "receipts_issued": self.receipts_issued,
        }

    def _check(self, request: GenerationRequest) -> None:
        prompt, limit = len(request.prompt_ids), self._facts.context_length
        if request.manifest != self._facts.manifest:
            raise RequestError(f"this pipeline serves {self._facts.manifest}, not {request.manifest}", "model")
        if prompt == 0:
            raise RequestError("the prompt is empty", "prompt")
        if prompt + request.max_tokens > limit:
            raise ContextLengthError(limit, prompt, request.max_tokens)
        if max(request.prompt_ids) >= self._facts.vocab_size:
            raise RequestError(f"token id {max(request.prompt_ids)} is not in the vocabulary", "prompt")
        beyond = next((id for id, _ in request.sampling.logit_bias if id >= self._facts.vocab_size), None)
        if beyond is not None:
            raise RequestError(f"token id {beyond} is not in the vocabulary", "logit_bias")
        if request.id in self._by_id:
            raise RequestError(f"a request {request.id} is running already", "id")

    def _pump(self) -> None:
        """Keep the stages busy: plan and send until enough is in flight or nothing can run."""
        while self._failure is None and self._scheduler.in_flight < self._max_flights:
            plan = self._scheduler.plan()
            if plan is None:
                return
            if plan.rows:
                self._started[plan.step] = time.monotonic()
                self._rows_sent += plan.rows
            self._send(plan, self._scheduler.rows_of(plan))

    def _send(self, plan: StepPlan, rows: bytes) -> None:
        try:
            self._first.send(plan.encode(rows))
        except PipelineError as e:
            self.fail(str(e))

    def _take(self, reply: Reply) -> list[Committed]:
        """Act on a reply; what it gave the sequences is still to be told."""
        match reply:
            case StepResult():
                if max(reply.tokens, default=0) >= self._facts.vocab_size:
                    self.fail(f"the last stage drew token {max(reply.tokens)} of {self._facts.vocab_size}")
                    return []
                try:
                    drawn = self._scheduler.apply(reply)
                except ProtocolError as e:
                    self.fail(f"the last stage answered nonsense: {e}")
                    return []
                self._started.pop(reply.step, None)
                return drawn
            case Roots():
                self._compare(reply)
            case Signed():
                self._collect(reply)
            case Fault():
                if self._started.pop(reply.step, None) is None:
                    # Not in a step that runs: hashing or an ending went wrong, and whose is not known.
                    self.fail(f"stage {reply.stage}: {reply.message}")
                    return []
                for seq in self._scheduler.drop_step(reply.step):
                    running = self._running[seq]
                    message = f"stage {reply.stage} failed: {reply.message}"
                    self._end(seq, FailedEvent(running.request.id, "pipeline", message))
        return []

    def _commit(self, committed: Committed) -> None:
        running = self._running.get(committed.seq)
        if running is None:
            return  # the pipeline has failed since: it ended with that
        if committed.token is not None:
            running.tokens.append(committed.token)
            self.tokens_drawn += 1
            running.sink(TokensEvent(running.request.id, (committed.token,)))
        if committed.reason is None:
            return
        running.reason, running.attempt, running.ended_s = committed.reason, committed.attempt, time.monotonic()
        if committed.reason == "cancelled" or not running.tokens:
            self._end(committed.seq, FinishedEvent(running.request.id, "cancelled", b""))

    def _ended(self, reply: Roots | Signed) -> _Running | None:
        """The request a stage speaks of, if it has ended here and waits for that stage's word."""
        running = self._running.get(reply.seq)
        if running is None or running.reason is None or not 0 <= reply.stage < self._facts.n_stages:
            return None
        return running

    def _compare(self, roots: Roots) -> None:
        running = self._ended(roots)
        if running is None:
            return
        running.roots[roots.stage] = roots
        if len(running.roots) < self._facts.n_stages:
            return
        chain = [running.roots[i] for i in range(self._facts.n_stages)]
        wrong = self._mismatch(running, chain)
        if wrong is None:
            self._scheduler.sign(roots.seq)
            return
        evidence = self._session.seal(ERROR_TYPE, canonical.encode({"v": 1, "request": running.hash, "error": wrong}))
        encoded = canonical.encode(evidence.to_value())
        self._scheduler.distrust()
        self._end(roots.seq, FailedEvent(running.request.id, "integrity", wrong, encoded))
        self._send(closing_plan(self._facts.epoch, roots.seq, roots.rows), b"")

    def _mismatch(self, running: _Running, chain: Sequence[Roots]) -> str | None:
        """What is wrong with the stages' roots, or None. Nothing is signed before this is None."""
        fed = (*running.request.prompt_ids, *running.tokens[:-1])
        if chain[0].in_root != ids_root(self._facts.manifest, fed):
            return "stage 0 did not receive the tokens of this request"
        for before, after in itertools.pairwise(chain):
            if before.out_root != after.in_root:
                return f"stage {after.stage} received other rows than stage {before.stage} sent"
        short = next((r for r in chain if r.rows != len(fed)), None)
        return None if short is None else f"stage {short.stage} hashed {short.rows} rows of {len(fed)}"

    def _collect(self, signed: Signed) -> None:
        running = self._ended(signed)
        if running is None:
            return
        try:
            value = canonical.decode(signed.statement, max_bytes=1 << 16)
            running.statements[signed.stage] = Envelope.from_value(value, "statement", 1 << 16)
            if len(running.statements) < self._facts.n_stages:
                return
            assert running.reason in ("stop", "length")
            bundle = issue(
                running.request,
                running.tokens,
                running.reason,
                statements=[running.statements[i] for i in range(self._facts.n_stages)],
                certificates=self._facts.certificates,
                registry=self._facts.registry,
                session=self._session,
                node_nonce=running.node_nonce,
                now_ms=time.time_ns() // 1_000_000,
                attempt=running.attempt,
            )
        except LlmdError as e:
            self._end(signed.seq, FailedEvent(running.request.id, "integrity", f"no receipt can be issued: {e}"))
            return
        self.receipts_issued += 1
        self._end(signed.seq, FinishedEvent(running.request.id, running.reason, bundle.encode()))

    def _end(self, seq: int, event: Event) -> None:
        running = self._running.pop(seq)
        del self._by_id[running.request.id]
        running.sink(event)
