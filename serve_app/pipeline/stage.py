"""One stage at work: take a message, launch its step, hand on what came out, witness. Knows nothing of requests or Ray.

Messages come in order through `deliver`. One thread launches steps, another waits for them and hands on, so that an
engine whose launch returns early has its next step queued before the last one ends. What was handed on is hashed
behind both, so a receipt costs the pipeline no waiting. Where an engine lends its rows to the next, the first thread
hands on too, before they are there; all messages then go that way, or they would overtake one another.
When a neighbour is lost the Stage is given up (`give_up`), and another one takes its engine, which knows no sequence
any more.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, replace

from serve_app.engine.engine import Engine, KeepsRows, Launched, Lent
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import NO_STEP, Fault, Reply, StepPlan, StepResult, encode_reply, forgetting_plan
from serve_app.pipeline.deliveries import Deliveries, DeliveryTerms
from serve_app.pipeline.pace import Pace
from serve_app.pipeline.progress import FLOOR_S, GPU_FLOOR_S, Progress
from serve_app.pipeline.retention import Retention
from serve_app.pipeline.witness import StageSpan, Witness
from serve_app.receipts.delivery import is_delivery_note
from serve_app.receipts.statement import StatementChain
from serve_app.transport.edge import Edge, Rows

_log = logging.getLogger(__name__)
MAX_QUEUED = 64  # messages: far above the steps a Head keeps in flight; past it the sender blocks
MAX_LAUNCHED = 2  # steps launched and not yet collected
_GIVEN_UP = -1  # the epoch of a Stage that takes no message any more


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    launched: Launched
    failed: Exception | None  # why the step itself could not run: only its endings did
    began: float
    handed_on: bool = False


class Stage:
    """Runs an engine between two edges. next: None for the last stage, which answers the Head with tokens."""

    def __init__(
        self,
        engine: Engine,
        span: StageSpan,
        chain: StatementChain,
        *,
        page_size: int,
        next: Edge | None,
        head: Edge,
        epoch: int,
        hashed: bool | None = None,
        retention: Retention | None = None,
        deliveries: DeliveryTerms | None = None,
    ) -> None:
        """hashed: what engine.hash_rows has said to a Stage before this one. None: it is asked now.

        retention: keeps the rows, unless the engine hashes them itself and cannot bring them to the host as well.
        deliveries: where rows are signed for on their way; None: nowhere.
        """
        self._engine, self._span, self._next, self._head, self._epoch = engine, span, next, head, epoch
        self._head_lock = threading.Lock()  # the witness and the collector speak to the Head too
        self._next_lock = threading.Lock()  # and where deliveries are signed, the witness to the next stage
        if hashed is None:
            hashed = engine.hash_rows(span.inlet.leaf_prefix, span.outlet.leaf_prefix, hand_on=next is not None)
        self.hashed = hashed
        self._open: set[int] = set()  # sequences that the engine knows
        if hashed and isinstance(engine, KeepsRows):
            if retention is not None:
                engine.keep_rows()
        elif hashed:
            retention = None
        self.retention = retention
        if self.retention is not None:
            self.retention.begin(span.stage, page_size)
        self.deliveries: Deliveries | None = None
        if deliveries is not None and deliveries.any:
            self.deliveries = Deliveries(
                deliveries, span.manifest, span.stage, chain.session, self._reply, self._send_note
            )
        self.witness = Witness(
            span,
            chain,
            self._reply,
            page_size=page_size,
            hashed=hashed,
            retention=self.retention,
            deliveries=self.deliveries,
        )
        self._inbox: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self._flights: queue.Queue[_Flight | None] = queue.Queue(MAX_LAUNCHED)
        self.progress = Progress(FLOOR_S if engine.profile.device == "cpu" else GPU_FLOOR_S)
        self.pace = Pace()
        self.steps = 0
        self.busy_s = 0.0  # with at least one step launched and not ended, for `llmd status`
        self._busy_until = 0.0
        self._early = False
        self._threads = [
            threading.Thread(target=work, name=f"stage-{span.stage}-{work.__name__.strip('_')}", daemon=True)
            for work in (self._launch_all, self._collect_all)
        ]
        for thread in self._threads:
            thread.start()

    def deliver(self, message: bytes) -> None:
        """Take a message in, after all before it."""
        self._inbox.put(message)

    def hand_on_early(self) -> None:
        """The engine lends its rows from now on. Called before the first message."""
        self._early = self._next is not None

    def lost(self, peer: str, why: str) -> None:
        """A neighbour is gone: the Head must know, for nothing that passes there will end."""
        self._reply(Fault(self._epoch, self._span.stage, NO_STEP, f"{peer} is gone: {why}"))

    def close(self) -> None:
        """Work off what came, then stop every thread."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()
        self.witness.close()

    def give_up(self, timeout_s: float) -> None:
        """Drop what came and end every thread; the engine forgets every sequence. Its edges are closed before.

        Raises PipelineError if a step does not end within timeout_s: the engine is then of no use any more.
        """
        self._epoch = _GIVEN_UP
        until = time.monotonic() + timeout_s
        try:
            self._inbox.put(None, timeout=timeout_s)
        except queue.Full:
            raise PipelineError(f"a step did not end within {timeout_s:.0f} s") from None
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise PipelineError(f"a step did not end within {timeout_s:.0f} s")
        self.witness.close()
        if self._open:
            self._engine.launch(forgetting_plan(self._open), memoryview(b"")).result()

    def _launch_all(self) -> None:
        while (message := self._inbox.get()) is not None:
            try:
                self._launch(message)
            except Exception as e:
                self._lost_message(e)
        self._flights.put(None)

    def _launch(self, message: bytes) -> None:
        if is_delivery_note(message):
            self._deliver_note(message)
            return
        plan, rows = StepPlan.decode(message)
        if plan.epoch != self._epoch:
            return  # of a pipeline that was: its Head no longer counts on an answer
        began = time.perf_counter()
        try:
            with self.progress.computing(plan.step, plan.rows):
                flight = _Flight(plan, self._engine.launch(plan, rows), None, began)
            self._open.update(plan.opens["seq"].tolist())
        except Exception as e:
            # Its rows are lost, but sequences that only end or wait for a signature in it must not be. The Head is told
            # in turn, behind the results of steps before: one of those may end what stands in this one.
            flight = _Flight(plan, self._engine.launch(plan.endings(), memoryview(b"")), e, began)
        self._open.difference_update(plan.closes["seq"].tolist())
        if self._early:
            flight = self._hand_on_early(flight)
        self._flights.put(flight)

    def _deliver_note(self, note: bytes) -> None:
        if self.deliveries is None:
            raise ProtocolError("a delivery note came, where no rows are signed for on their way")
        self.deliveries.heard(note)
        self.witness.look()

    def _hand_on_early(self, flight: _Flight) -> _Flight:
        if flight.failed is not None:
            self._hand_on(flight.plan, None)
        elif isinstance(flight.launched, Lent) and flight.launched.lent is not None:
            self._hand_on(flight.plan, flight.launched.lent)
        else:  # what does not fit into an inbox goes through the host, and is waited for here
            try:
                with self.progress.computing(flight.plan.step, flight.plan.rows):
                    rows: Rows | None = flight.launched.result().hidden
            except Exception:
                rows = None  # who collects it says why
            self._hand_on(flight.plan, rows)
        return replace(flight, handed_on=True)

    def _hand_on(self, plan: StepPlan, rows: Rows | None) -> None:
        """To the next stage; rows None: the step failed here."""
        assert self._next is not None
        try:
            with self._next_lock:
                if rows is None:
                    self._next.send(plan.endings().encode(b""))
                else:
                    self._next.send(plan.encode(b""), rows)
        except PipelineError as e:
            self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"the next stage is gone: {e}"))

    def _send_note(self, note: bytes) -> None:
        """Behind the step that it is for, which was handed on before the witness saw it."""
        assert self._next is not None, "nobody follows"
        with self._next_lock:
            self._next.send(note)

    def _collect_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            try:
                self._collect(flight)
            except Exception as e:
                self._lost_message(e)

    def _collect(self, flight: _Flight) -> None:
        plan, failed = flight.plan, flight.failed is not None
        if flight.failed is not None:
            self._failed(plan, flight.failed)
        try:
            with self.progress.computing(plan.step, plan.rows, flight.began):
                out = flight.launched.result()
        except Exception as e:
            self._failed(plan, e)
            failed = True
        now = time.perf_counter()
        took_s = now - max(flight.began, self._busy_until)
        self.busy_s += took_s
        self._busy_until = now
        if plan.rows and not failed:
            self.pace.took(plan.rows, int(plan.draws.sum()), took_s)
        self.steps += 1
        if self._next is not None and not flight.handed_on:
            self._hand_on(plan, None if failed else out.hidden)
        if failed:
            self.witness.lost(plan)
            return
        if self._next is None and plan.rows:
            self._reply(StepResult(plan.epoch, plan.step, out.tokens))
        self.witness.saw(plan, out)

    def _failed(self, plan: StepPlan, error: Exception) -> None:
        _log.error("stage %d failed in step %d", self._span.stage, plan.step, exc_info=error)
        self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"{type(error).__name__}: {error}"))

    def _lost_message(self, error: Exception) -> None:
        _log.error("stage %d lost a message", self._span.stage, exc_info=error)
        # What it would have opened, closed or signed is not known here, and the Head counts on it.
        self._reply(Fault(self._epoch, self._span.stage, NO_STEP, f"a message was lost: {error}"))

    def _reply(self, reply: Reply) -> None:
        """Tell the Head. One that is gone ends nothing here: both threads go on until they are closed."""
        with self._head_lock:
            try:
                self._head.send(encode_reply(reply))
            except PipelineError as e:
                _log.warning("stage %d has no head to answer: %s", self._span.stage, e)
