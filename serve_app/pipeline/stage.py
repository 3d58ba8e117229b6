"""One stage at work: take a message, compute, hand on, witness. Knows nothing of requests or of Ray.

Messages come in order through `deliver`; one thread works through them. Between compute and hashing the
rows leave for the next stage, so a receipt costs the pipeline no waiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from serve_app.engine.engine import Engine
from serve_app.errors import PipelineError
from serve_app.messages.step import NO_STEP, Fault, Reply, StepPlan, StepResult, encode_reply
from serve_app.pipeline.witness import StageSpan, Witness
from serve_app.receipts.statement import StatementChain
from serve_app.transport.edge import Edge

_log = logging.getLogger(__name__)
MAX_QUEUED = 64  # messages: far above the steps a Head keeps in flight; past it the sender blocks


class Stage:
    """Runs an engine between two edges. next: None for the last stage, which answers the Head with tokens."""

    def __init__(
        self, engine: Engine, span: StageSpan, chain: StatementChain, *, next: Edge | None, head: Edge, epoch: int
    ) -> None:
        self._engine, self._span, self._next, self._head, self._epoch = engine, span, next, head, epoch
        self._head_lock = threading.Lock()  # the witness speaks to the Head too
        self.witness = Witness(span, chain, self._reply)
        self._inbox: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self.steps = 0
        self.busy_s = 0.0  # spent computing, for `llmd status`
        self._thread = threading.Thread(target=self._run, name=f"stage-{span.stage}", daemon=True)
        self._thread.start()

    def deliver(self, message: bytes) -> None:
        """Take a message in, after all before it."""
        self._inbox.put(message)

    def close(self) -> None:
        """Work off what came, then stop both threads."""
        self._inbox.put(None)
        self._thread.join()
        self.witness.close()

    def _run(self) -> None:
        while (message := self._inbox.get()) is not None:
            try:
                self._handle(message)
            except Exception as e:
                _log.exception("stage %d lost a message", self._span.stage)
                # What it would have opened, closed or signed is not known here, and the Head counts on it.
                self._reply(Fault(self._epoch, self._span.stage, NO_STEP, f"a message was lost: {e}"))

    def _handle(self, message: bytes) -> None:
        plan, rows = StepPlan.decode(message)
        if plan.epoch != self._epoch:
            return  # of a pipeline that was: its Head no longer counts on an answer
        began = time.perf_counter()
        try:
            out = self._engine.run(plan, rows)
        except Exception as e:
            _log.exception("stage %d failed in step %d", self._span.stage, plan.step)
            self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"{type(e).__name__}: {e}"))
            # Its rows are lost, but sequences that only end or wait for a signature in it must not be.
            plan, rows = plan.endings(), memoryview(b"")
            out = self._engine.run(plan, rows)
        self.busy_s += time.perf_counter() - began
        self.steps += 1
        try:
            if self._next is not None:
                self._next.send(plan.encode(out.hidden))
            elif plan.rows:
                self._reply(StepResult(plan.epoch, plan.step, out.tokens))
        except PipelineError as e:
            self._reply(Fault(plan.epoch, self._span.stage, plan.step, f"the next stage is gone: {e}"))
        self.witness.saw(plan, rows, out.hidden)

    def _reply(self, reply: Reply) -> None:
        """Tell the Head. One that is gone ends nothing here: both threads go on until they are closed."""
        with self._head_lock:
            try:
                self._head.send(encode_reply(reply))
            except PipelineError as e:
                _log.warning("stage %d has no head to answer: %s", self._span.stage, e)
