"""How rows come into one engine's GPU and leave it, and tokens from the last stage to the first.

Through the host, unless a neighbour's inbox (lent_rows.py) was found to work. An inbox is tried before it is used: the
sender puts a probe into it and the receiver looks whether it is there.
"""

from __future__ import annotations

import logging
from collections import deque

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.engine import BoxKind
from serve_app.engine.gpu.copies import download, upload, upload_rows
from serve_app.engine.gpu.lent_rows import CUDA, ROW_PLACE_BYTES, TOKEN_PLACES, Driver, Inbox, Offer, Outbox, Reference
from serve_app.engine.request_table import Ints, PlannedSpans, RequestTable
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import MAX_GUESSES, StepPlan

_log = logging.getLogger(__name__)
_PROBE = 1  # its number: the first step's rows and tokens have larger ones
_MAX_LATE = 64  # steps whose tokens have not been taken: far more than are on their way


class Port:
    """Made with the engine; every call that queues work is made on the engine's stream."""

    def __init__(self, device: torch.device, vocab_size: int, driver: Driver = CUDA) -> None:
        self._driver, self._vocab_size = driver, vocab_size
        self.hand_on = True  # somebody needs the rows that leave
        self._device = device
        self._inboxes: dict[BoxKind, Inbox] = {}
        self._outboxes: dict[BoxKind, Outbox] = {}
        self._used: set[BoxKind] = set()  # outboxes that were found to work
        self._sent = _PROBE
        self._came = _PROBE
        self._stamped = -1  # the last step
        self._late: deque[tuple[int, Tensor]] = deque()  # steps that drew for slots, whose tokens were not taken yet
        self._last_drawn: dict[int, int] = {}  # slot -> the step that drew for it last
        self.takes_tokens = False  # ids that are not known yet come from the last stage

    # -- before the first step

    def offer_inbox(self, kind: BoxKind, places: int, max_rows: int) -> bytes | None:
        """As engine.LendsRows."""
        if not self._driver.works_on(self._device):
            return None
        torch.zeros(1, device=self._device)  # this thread may not have used the GPU before
        try:
            rows = kind == "rows"
            box = Inbox(
                self._driver,
                places if rows else TOKEN_PLACES,
                ROW_PLACE_BYTES if rows else 4 * (1 + MAX_GUESSES) * max_rows,
            )
        except PipelineError as e:
            _log.warning("%s come through the host: %s", kind, e)
            return None
        self._inboxes[kind] = box
        return box.offer.encode()

    def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        """As engine.LendsRows."""
        if not self._driver.works_on(self._device):
            return False
        probe = self._probe()
        try:
            self._outboxes[kind] = box = Outbox(self._driver, Offer.decode(offer), self._device)
            box.put(_PROBE, probe)
        except (PipelineError, ProtocolError) as e:
            _log.warning("%s go through the host: %s", kind, e)
            return False
        self._driver.synchronize(self._device)
        return True

    def got_probe(self, kind: BoxKind) -> bool:
        """As engine.LendsRows."""
        probe, box = self._probe(), self._inboxes[kind]
        found = torch.zeros_like(probe)
        if not box.is_stamped(_PROBE, self._device):  # or the copy would wait for ever
            return False
        box.take(_PROBE, found)
        self._driver.synchronize(self._device)
        works = torch.equal(probe, found)
        self.takes_tokens |= works and kind == "tokens"
        return works

    def use_outbox(self, kind: BoxKind) -> None:
        """As engine.LendsRows."""
        self._used.add(kind)

    # -- after the last step

    def release(self) -> None:
        """As engine.LendsRows."""
        for box in self._inboxes.values():
            box.release(self._device)

    def renewed(self) -> Port:
        """One without neighbours, in place of this one, whose memory is given back. No step is under way."""
        if self._inboxes or self._outboxes:
            self._driver.synchronize(self._device)
        for inbox in self._inboxes.values():
            inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()
        port = Port(self._device, self._vocab_size, self._driver)
        port.hand_on = self.hand_on
        return port

    def _probe(self) -> Tensor:
        return torch.full((1,), 7, dtype=torch.int32, device=self._device)

    # -- rows

    def holds(self, rows: memoryview, n_bytes: int) -> bool:
        """Whether this is, or refers to, so many bytes of rows."""
        if len(rows) == n_bytes:
            return True
        reference = Reference.decode(rows) if "rows" in self._inboxes else None
        return reference is not None and reference.n_bytes == n_bytes

    def bring(self, rows: memoryview, out: Tensor) -> None:
        """Queue what fills out [rows, width]. Raises ProtocolError for a reference to rows that were taken already."""
        n_bytes = out.numel() * out.element_size()
        if len(rows) == n_bytes:
            upload_rows(rows, out)
            return
        reference = Reference.decode(rows)
        if reference is None or reference.n_bytes != n_bytes or reference.number <= self._came:
            raise ProtocolError(f"{len(rows)} bytes are neither {n_bytes} bytes of rows nor a reference to later ones")
        self._came = reference.number
        self._inboxes["rows"].take(reference.number, out)

    def give(self, rows: Tensor) -> tuple[Tensor | None, bytes | None]:
        """Queue what hands these rows on: their copy on the host, or, in place of it, a reference.

        Neither if nobody needs them.
        """
        if not self.hand_on:
            return None, None
        if "rows" in self._used and self._outboxes["rows"].holds(rows):
            self._sent += 1
            self._outboxes["rows"].put(self._sent, rows)
            return None, Reference(self._sent, rows.numel() * rows.element_size()).encode()
        return download(rows), None

    # -- tokens: the last stage

    def give_tokens(self, step: int, tokens: Tensor | None) -> None:
        """Queue what tells the first stage the tokens of a step, in the order of its spans; None: it drew none."""
        if "tokens" in self._used and step > self._stamped:
            box = self._outboxes["tokens"]
            if tokens is not None and not box.holds(tokens):
                raise ProtocolError(f"step {step} draws {len(tokens)} tokens, more than go past the host")
            self._stamped = step
            box.put(_number(step), tokens)

    # -- tokens: the first stage

    def drew(self, plan: StepPlan, spans: PlannedSpans, table: RequestTable) -> None:
        """This step, which has been queued, draws for some of its spans when it has come through all stages."""
        if not self.takes_tokens or not spans.samples.any():
            return
        # One for each token that will come. Who drew for guesses has several here, and then no row without an id.
        slots = np.repeat(spans.slots, plan.draws)
        on_device = torch.empty(len(slots), dtype=torch.int32, device=self._device)
        upload(slots, on_device)
        self._late.append((plan.step, on_device))
        self._last_drawn |= dict.fromkeys(slots.tolist(), plan.step)
        table.drew_in(spans)
        if len(self._late) > _MAX_LATE:
            self._take_tokens(table)

    def require_tokens(self, spans: PlannedSpans, ids: Ints, table: RequestTable) -> None:
        """Queue what makes the table's last tokens those that rows without an id stand for."""
        if not self.takes_tokens:
            return
        of = np.searchsorted(np.cumsum(spans.counts), np.flatnonzero(ids < 0), "right")
        needed = max(self._last_drawn.get(slot, -1) for slot in spans.slots[of].tolist())
        while self._late and self._late[0][0] <= needed:
            self._take_tokens(table)

    def _take_tokens(self, table: RequestTable) -> None:
        step, slots = self._late.popleft()
        tokens = torch.empty(len(slots), dtype=torch.int32, device=self._device)
        self._inboxes["tokens"].take(_number(step), tokens)
        # One that is none, of logits that were not finite, fails its step there; here it must not reach beyond a table.
        table.last_tokens.index_copy_(0, slots.long(), tokens.clamp_(0, self._vocab_size - 1))


def _number(step: int) -> int:
    return step + 1 + _PROBE
