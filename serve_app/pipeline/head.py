"""The Head of one pipeline: the only owner of its requests, from submission to receipt.

One request: submit -> scheduler -> plans down the stages -> tokens back -> its rows' roots from every stage,
compared -> the stages sign -> the receipt. All of it in one event loop, nothing shared; knows neither Ray, HTTP,
text nor tensors. Stages answer through `deliver`.
A stage may be lost (`lose`): requests then wait. When stages that know nothing stand in their places (`lead`,
`resume`), each begins anew behind the tokens it has drawn, and its reader sees a pause.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable

from serve_app.errors import OverloadedError, PipelineError, ProtocolError, RequestError
from serve_app.messages.events import Begun
from serve_app.messages.request import (
    NONCE_BYTES,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    TokensEvent,
)
from serve_app.messages.step import (
    Fault,
    Refused,
    Reply,
    Roots,
    Signed,
    StepPlan,
    StepResult,
    closing_plan,
    decode_reply,
)
from serve_app.pipeline.assurance import Audits, NoAudits
from serve_app.pipeline.disputes import of_refusal, of_roots
from serve_app.pipeline.facts import PipelineFacts, require_servable
from serve_app.pipeline.running import Running, bundle_of, load_of, mismatch, ticket_of, too_late
from serve_app.receipts import rows_native
from serve_app.receipts.commitment import request_hash
from serve_app.receipts.evidence import Evidence
from serve_app.receipts.identity import Session
from serve_app.scheduling.flights import flights_ahead, lookahead
from serve_app.scheduling.scheduler import Committed, Scheduler
from serve_app.transport.edge import Edge
from shard_tools import canonical
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope

_log = logging.getLogger(__name__)
_MAX_STALLS = 3  # stages lost in a row while a request runs that draws nothing in between: it may be what kills them
EXPIRY_MARGIN_S = 30  # a receipt signed later than this before the end might be refused by a clock that runs ahead

Sink = Callable[[Event], None]


class Head:
    """Leads one pipeline. Every method is called in the event loop it was made for."""

    def __init__(
        self,
        facts: PipelineFacts,
        scheduler: Scheduler,
        first: Edge,
        session: Session,
        audits: Audits = NoAudits(),  # noqa: B008 (it holds nothing)
    ) -> None:
        rows_native.prepare()
        self._audits = audits
        self._facts, self._scheduler, self._first, self._session = facts, scheduler, first, session
        self._seqs = itertools.count(1)
        self._running: dict[int, Running] = {}
        self._by_id: dict[RequestId, int] = {}
        self._started: dict[int, float] = {}  # step -> when it left
        self._failure: str | None = None
        self._lost: tuple[str, float] | None = None  # why it waits for stages, and since when
        self._draining = False
        self._max_flights = facts.max_flights
        self._rows_sent = 0
        self.tokens_drawn = 0
        self.receipts_issued = 0
        self.resumed = 0  # times that lost stages were replaced
        self.proofs: deque[bytes] = deque(maxlen=64)  # the latest that convict a stage, for whoever keeps standings

    @property
    def rows_run(self) -> int:
        """Rows sent down the stages, without those of attempts that were given up and of wrong guesses."""
        s = self._scheduler
        return self._rows_sent - s.rows_abandoned - (s.guesses - s.guesses_right)

    @property
    def failure(self) -> str | None:
        """Why this pipeline can do no more, or None while it can."""
        return self._failure

    @property
    def lost(self) -> str | None:
        """Why requests wait until stages are replaced, or None."""
        return None if self._lost is None else self._lost[0]

    def look_ahead(self) -> None:
        """Tokens go from the last stage to the first by themselves: plan a row behind each that is on its way."""
        self._scheduler.look_ahead(1)
        self._max_flights = flights_ahead(self._facts.n_stages)

    def submit(self, request: GenerationRequest, sink: Sink, begun: Begun | None = None) -> bytes:
        """Take the request in; its events go to sink, the last one a FinishedEvent or FailedEvent.

        begun: it goes on behind what was drawn. Returns the nonce that keys its noise. Raises RequestError,
        OverloadedError, PipelineError; then nothing was taken in.
        """
        if self._failure is not None:
            raise PipelineError(f"the pipeline has failed ({self._failure}) and is being rebuilt; try again soon")
        if self._draining and begun is None:
            raise OverloadedError("a newer version takes this one's place, or other pipelines; try again soon")
        require_servable(self._facts, request, begun)
        if request.id in self._by_id:
            raise RequestError(f"a request {request.id} is running already", "id")
        seq = next(self._seqs)
        nonce = secrets.token_bytes(NONCE_BYTES) if begun is None else begun.node_nonce
        running = Running(request, sink, request_hash(request), nonce)
        if begun is not None:
            running.go_on(begun)
        self._audits.admit(request, resumed=begun is not None)
        try:
            self._scheduler.admit(ticket_of(seq, running))
        except LlmdError:
            self._audits.ended(request, b"")
            raise
        running.reason = None
        self._running[seq] = running
        self._by_id[request.id] = seq
        self.allow(request.id, request.timeout_ms)
        self._pump()
        return nonce

    def drain(self, on: bool) -> int:
        """Refuse what is new from now on, or take it in again. Returns how many requests are still to end."""
        self._draining = on
        return len(self._running)

    def allow(self, id: RequestId, timeout_ms: int | None) -> None:
        """A request that runs may take so long from now, whatever it was given before."""
        seq = self._by_id[id]
        running = self._running[seq]
        if running.alarm is not None:
            running.alarm.cancel()
        loop = asyncio.get_running_loop()
        running.overdue = False
        running.alarm = None if timeout_ms is None else loop.call_later(timeout_ms / 1000, self._deadline, seq)

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
        if reply.epoch == self._facts.epoch and self._failure is None and self._lost is None:
            drawn = self._take(reply)
            self._pump()  # first: the stages wait for it, and whoever reads tokens does not feel the difference
            for committed in drawn:
                self._commit(committed)

    def watch(self) -> None:
        """Called every second or so: a step or a signature that is overdue means that a stage hangs."""
        if time.time() > self._facts.expires_s - EXPIRY_MARGIN_S:
            # Whatever were signed from here on, no client could verify.
            self.lose("its session keys or registry run out, and it goes on with fresh ones")
        now = time.monotonic()
        if self._lost is not None:
            why, since = self._lost
            if now - since > self._facts.repair_s:
                self.fail(f"{why}; nothing stands in its place after {self._facts.repair_s:.0f} s")
            return
        for step, began in self._started.items():
            if now - began > self._facts.step_timeout_s:
                self.lose(f"step {step} took more than {self._facts.step_timeout_s:.0f} s")
                return
        for running in self._running.values():
            if running.ended_s is not None and now - running.ended_s > self._facts.step_timeout_s:
                silent = sorted(set(range(self._facts.n_stages)) - running.statements.keys())
                self.lose(f"stage {silent[0]} signed nothing for {self._facts.step_timeout_s:.0f} s after a request")
                return

    def lose(self, why: str) -> None:
        """Some part is gone: nothing runs, and nothing that comes counts, until `resume`."""
        if self._facts.repair_s <= 0:
            self.fail(why)
        elif self._failure is None and self._lost is None:
            _log.warning("pipeline epoch %d waits for a part: %s", self._facts.epoch, why)
            self._lost = why, time.monotonic()
            self._started.clear()

    def lead(self, facts: PipelineFacts, first: Edge, session: Session) -> None:
        """Stages that know nothing stand ready in a new epoch."""
        self.lose("its stages are connected anew")
        self._facts, self._first, self._session = facts, first, session
        self._max_flights = facts.max_flights
        self._scheduler.look_ahead(lookahead(facts.n_stages))

    def resume(self) -> None:
        """Every request goes on, on the stages that `lead` named."""
        if self._failure is not None or self._lost is None:
            return
        self._lost = None
        began = self._scheduler.opened
        over = self._scheduler.restart(self._facts.epoch)
        for seq, running in list(self._running.items()):
            if running.overdue:
                self._end(seq, too_late(running.request.id))
            elif running.reason is not None:
                # All is told but the receipt, for which its rows must run again.
                running.attempt += 1
                self._scheduler.admit(ticket_of(seq, running))
                running.reason, running.ended_s = None, None
                running.roots, running.statements = {}, {}
            elif seq in began:
                running.stalls = running.stalls + 1 if len(running.tokens) == running.resumed_at else 0
                running.resumed_at = len(running.tokens)
                if running.stalls >= _MAX_STALLS:
                    self._scheduler.drop(seq)
                    message = f"stages were lost {running.stalls + 1} times while this request ran"
                    self._end(seq, FailedEvent(running.request.id, "pipeline", message))
        for committed in over:
            self._commit(committed)
        self.resumed += 1
        self._pump()

    def fail(self, why: str) -> None:
        """The pipeline can do no more: every request ends with an error, nothing waits for ever."""
        if self._failure is None:
            _log.error("pipeline epoch %d failed: %s", self._facts.epoch, why)
            self._failure = why
            for seq in list(self._running):
                self._end(seq, FailedEvent(self._running[seq].request.id, "lost", f"the pipeline failed: {why}"))

    def status(self) -> dict[str, Value]:
        """Load and counters, for people."""
        return {
            "epoch": self._facts.epoch,
            "failure": self._failure,
            "waits_for": self.lost,
            "resumed": self.resumed,
            **load_of(self._scheduler),
            "rows_run": self.rows_run,
            "tokens_drawn": self.tokens_drawn,
            "receipts_issued": self.receipts_issued,
        }

    def _pump(self) -> None:
        """Keep the stages busy: plan and send until enough is in flight or nothing can run."""
        while self._failure is None and self._lost is None and self._scheduler.in_flight < self._max_flights:
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
            self.lose(str(e))

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
            case Refused():
                refused = self._running.get(reply.seq)
                if refused is not None and 0 < reply.stage < self._facts.n_stages:
                    self._disagree(reply.seq, of_refusal(refused.hash, reply))
            case Fault():
                if self._started.pop(reply.step, None) is None:
                    # Not in a step that runs: hashing or an ending went wrong, and whose is not known.
                    self.lose(f"stage {reply.stage}: {reply.message}")
                    return []
                for seq in self._scheduler.drop_step(reply.step):
                    running = self._running.get(seq)
                    if running is None:
                        continue  # its deadline came first
                    message = f"stage {reply.stage} failed: {reply.message}"
                    self._end(seq, FailedEvent(running.request.id, "pipeline", message))
        return []

    def _commit(self, committed: Committed) -> None:
        running = self._running.get(committed.seq)
        if running is None:
            return  # it has ended since: the pipeline failed, or its deadline came
        if committed.token is not None:
            running.tokens.append(committed.token)
            self.tokens_drawn += 1
            running.sink(TokensEvent(running.request.id, (committed.token,)))
        if committed.reason is None:
            return
        running.reason, running.attempt, running.ended_s = committed.reason, committed.attempt, time.monotonic()
        if committed.reason == "cancelled" or not running.tokens:
            self._end(committed.seq, FinishedEvent(running.request.id, "cancelled", b""))

    def _ended(self, reply: Roots | Signed) -> Running | None:
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
        wrong = mismatch(self._facts.manifest, running, chain)
        if wrong is None:
            self._scheduler.sign(roots.seq)
            return
        self._disagree(roots.seq, of_roots(running.hash, wrong, chain, self._facts.certificates))

    def _disagree(self, seq: int, evidence: Evidence) -> None:
        """Two stages have other rows of this request: it ends, and nobody begins with what pages hold of it."""
        running = self._running[seq]
        self.proofs.extend([evidence.proof] if evidence.proof else [])
        self._scheduler.stop(seq, "cancelled")
        self._scheduler.distrust()
        self._end(seq, FailedEvent(running.request.id, "integrity", evidence.error, evidence.seal(self._session)))
        if running.reason is not None:  # else the scheduler has the stages forget it, when nothing of it is in flight
            self._send(closing_plan(self._facts.epoch, seq, 0), b"")

    def _collect(self, signed: Signed) -> None:
        running = self._ended(signed)
        if running is None:
            return
        try:
            value = canonical.decode(signed.statement, max_bytes=1 << 16)
            running.statements[signed.stage] = Envelope.from_value(value, "statement", 1 << 16)
            if len(running.statements) < self._facts.n_stages:
                return
            bundle = bundle_of(running, self._facts, self._session)
        except LlmdError as e:
            self._end(signed.seq, FailedEvent(running.request.id, "integrity", f"no receipt can be issued: {e}"))
            return
        assert running.reason is not None, "_ended has asked"
        self.receipts_issued += 1
        self._end(signed.seq, FinishedEvent(running.request.id, running.reason, bundle.encode()))

    def _deadline(self, seq: int) -> None:
        """The time of a request that has not ended is over: it ends now, whatever the stages do."""
        running = self._running[seq]
        running.overdue = True
        if running.reason is not None and self._lost is None:
            return  # all is told but the receipt, which comes at once; the stages would wait for the word to sign
        self._scheduler.stop(seq, "cancelled")
        self._end(seq, too_late(running.request.id))
        self._pump()

    def _end(self, seq: int, event: Event) -> None:
        running = self._running.pop(seq)
        if running.alarm is not None:
            running.alarm.cancel()
        del self._by_id[running.request.id]
        self._audits.ended(running.request, event.receipt if isinstance(event, FinishedEvent) else b"")
        running.sink(event)
