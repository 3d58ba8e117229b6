"""What a stage took in and gave for whole requests, kept as bytes so that somebody can compute it again.

A RecordingEngine stands where an engine stands and notes the rows of every sequence; nothing of what it runs changes.
Records are found by request hash and attempt, as the stage's statement names them. Memory is bounded: past it the
oldest finished records go and are counted, because a request that cannot be audited must not look as if it could.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from serve_app.engine.engine import Engine, EngineProfile, Launched, StepOutput
from serve_app.messages.step import SEAL, StepPlan

MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The rows of positions 0 .. n-1 of one request at one stage, as they came in and as they went out."""

    received: bytes
    sent: bytes


@dataclass(slots=True)
class _Open:
    request: bytes
    attempt: int
    received: list[bytes] = field(default_factory=list)  # by position: a void guess is overwritten by what replaces it
    sent: list[bytes] = field(default_factory=list)


class StageRecords:
    """Finished records of one stage, the oldest dropped past a bound; safe to read from other threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._records: OrderedDict[tuple[bytes, int], StageRecord] = OrderedDict()
        self._lock = threading.Lock()
        self.dropped = 0  # records that went before somebody took them

    def put(self, request: bytes, attempt: int, record: StageRecord) -> None:
        """Keep it, if need be in place of older ones."""
        with self._lock:
            self._records[request, attempt] = record
            self._bytes += len(record.received) + len(record.sent)
            while self._bytes > self._max_bytes:
                _, old = self._records.popitem(last=False)
                self._bytes -= len(old.received) + len(old.sent)
                self.dropped += 1

    def take(self, request: bytes, attempt: int) -> StageRecord | None:
        """The record, which is no longer kept here; None if it never was, or was dropped."""
        with self._lock:
            record = self._records.pop((request, attempt), None)
            if record is not None:
                self._bytes -= len(record.received) + len(record.sent)
            return record


class RecordingEngine:
    """Implements engine.Engine by another engine, and keeps the rows of what is sealed."""

    def __init__(self, engine: Engine, records: StageRecords, profile: EngineProfile | None = None) -> None:
        """profile: what it says it is, if not what it is: of a stage that cheats."""
        self._engine, self._records = engine, records
        self._profile = profile or engine.profile
        self._open: dict[int, _Open] = {}

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    def reserve(self, n_pages: int, max_sequences: int) -> None:
        self._engine.reserve(n_pages, max_sequences)

    def hash_rows(self, inlet: bytes, outlet: bytes, *, hand_on: bool) -> bool:
        return False  # the rows are wanted on the host, so an engine that would keep them elsewhere is not asked

    def launch(self, plan: StepPlan, rows: memoryview) -> Launched:
        return _Recorded(self, plan, self._engine.launch(plan, rows))

    def note(self, plan: StepPlan, output: StepOutput) -> None:
        """A step has run."""
        for item in plan.opens:
            assert not item["cached"], "rows of pages that an earlier sequence filled are not recorded: no prefix cache"
            self._open[int(item["seq"])] = _Open(item["request"].tobytes(), int(item["attempt"]))
        if plan.rows:
            size_in, size_out = len(output.received) // plan.rows, len(output.hidden) // plan.rows
            row = 0
            for seq, start, count in plan.spans[["seq", "start", "count"]].tolist():
                own = self._open.get(seq)
                if own is not None:
                    for kept, source, size in (
                        (own.received, output.received, size_in),
                        (own.sent, output.hidden, size_out),
                    ):
                        del kept[start:]
                        kept += [bytes(source[i * size : (i + 1) * size]) for i in range(row, row + count)]
                row += count
        for seq, counted, seal in plan.closes.tolist():
            own = self._open.pop(seq, None)
            if own is not None and seal == SEAL:
                record = StageRecord(b"".join(own.received[:counted]), b"".join(own.sent[:counted]))
                self._records.put(own.request, own.attempt, record)


class _Recorded:
    """A step under way, noted once it has ended; steps are waited for in the order of launching."""

    def __init__(self, engine: RecordingEngine, plan: StepPlan, launched: Launched) -> None:
        self._engine, self._plan, self._launched = engine, plan, launched

    def result(self) -> StepOutput:
        output = self._launched.result()
        self._engine.note(self._plan, output)
        return output
