"""What a stage keeps of its rows: exactly what it signs for, within its bound, and what is missing is counted."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.engine import StepOutput
from serve_app.engine.load import LoadOptions
from serve_app.errors import ProtocolError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.record import StageRecord
from serve_app.messages.request import FinishedEvent, GenerationRequest, RequestId, Sampling, fresh_salt
from serve_app.messages.step import ABANDON, CLOSE, FORGET, OPEN, SEAL, SPAN, StepPlan
from serve_app.pipeline.retention import HOLD_S, Retention
from serve_app.receipts.check import check
from serve_app.receipts.rows import Boundary, RowTree, ids_boundary
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore

PAGE, IN, OUT = 4, 2, 3  # rows; bytes of a row that comes in, and of one that goes out
ONE_PAGE = PAGE * (IN + OUT)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def name(i: int) -> bytes:
    return bytes([i]) * 32


def step(
    spans: list[tuple[int, int, int, list[int]]],
    opens: dict[int, int] | None = None,
    closes: list[tuple[int, int, int]] | None = None,
) -> StepPlan:
    """spans: seq, start, count, new pages. opens: seq -> rows it finds in its first pages; it is request `seq`."""
    opening = np.zeros(len(opens or {}), OPEN)
    for i, (seq, cached) in enumerate((opens or {}).items()):
        opening["seq"][i], opening["request"][i], opening["cached"][i] = seq, seq, cached
    rows = np.array([(seq, start, count, len(new), 0) for seq, start, count, new in spans], SPAN)
    pages = np.array([page for span in spans for page in span[3]], "<u4")
    return StepPlan(1, 0, opening, rows, pages, np.array(closes or [], CLOSE), np.zeros(0, "<u8"))


def output(plan: StepPlan, salt: int = 0) -> StepOutput:
    """Rows that say whose they are and where."""
    where = [(seq, p) for seq, start, n, *_ in plan.spans.tolist() for p in range(start, start + n)]
    received = b"".join(bytes((seq, p + salt)) for seq, p in where)
    return StepOutput(memoryview(received), memoryview(b"".join(bytes((seq, p + salt, 7)) for seq, p in where)), ())


def begun(max_bytes: int = 1 << 20) -> tuple[Retention, Clock]:
    clock = Clock()
    retention = Retention(max_bytes, clock)
    retention.begin(0, PAGE)
    return retention, clock


def run(retention: Retention, plan: StepPlan, salt: int = 0) -> None:
    retention.saw(plan, output(plan, salt) if plan.rows else StepOutput(memoryview(b""), memoryview(b""), ()))


def whole(retention: Retention, seq: int, pages: list[int], rows: int, seal: int = SEAL) -> None:
    run(retention, step([(seq, 0, rows, pages)], {seq: 0}, [(seq, rows, seal)]))


def test_rows_are_kept_as_they_count() -> None:
    """Prefill, decode, a wrong guess that is run over again, a row too many at the end."""
    retention, _ = begun()
    run(retention, step([(1, 0, 6, [5, 3])], {1: 0}))
    run(retention, step([(1, 6, 4, [8])]), salt=100)  # of these the last three were wrong guesses
    run(retention, step([(1, 7, 2, [])]))
    run(retention, step([(1, 9, 1, [])], closes=[(1, 9, SEAL)]))
    record = retention.read(name(1), 0)
    assert record is not None
    assert record.received == b"".join(bytes((1, p + 100 * (p == 6))) for p in range(9))
    assert record.sent[-OUT:] == bytes((1, 8, 7)) and len(record.sent) == 9 * OUT
    assert retention.read(name(1), 1) is None and retention.bytes == 3 * ONE_PAGE


def test_a_shared_beginning_is_kept_once_and_longer_than_the_first_that_had_it() -> None:
    """The second sequence has the rows that ran for the first; so has the third, after both were released."""
    retention, _ = begun()
    whole(retention, 1, [0, 1], 8)
    run(retention, step([(2, 4, 2, [0, 9])], {2: 4}, [(2, 6, SEAL)]))
    assert retention.bytes == 3 * ONE_PAGE
    retention.release(name(1), 0)
    record = retention.read(name(2), 0)
    assert record is not None and retention.read(name(1), 0) is None
    assert record.received == b"".join(bytes((1 if p < 4 else 2, p)) for p in range(6))
    retention.release(name(2), 0)
    run(retention, step([(3, 4, 1, [0, 2])], {3: 4}, [(3, 5, SEAL)]))
    assert retention.read(name(3), 0) is not None and retention.unauditable == 0


def test_what_was_released_makes_room_first_and_then_nothing_can_open_behind_it() -> None:
    retention, _ = begun(3 * ONE_PAGE)
    whole(retention, 1, [0], 4)
    whole(retention, 2, [1, 2], 8)
    retention.release(name(2), 0)
    whole(retention, 3, [3], 4)
    assert [retention.read(name(i), 0) is not None for i in (1, 2, 3)] == [True, False, True]
    assert retention.bytes == 2 * ONE_PAGE and retention.unauditable == 0
    run(retention, step([(4, 4, 1, [1, 4])], {4: 4}, [(4, 5, SEAL)]))
    assert retention.read(name(4), 0) is None and retention.unauditable == 1


@pytest.mark.parametrize("seal", [FORGET, ABANDON])
def test_what_nobody_signs_for_is_only_a_beginning_of_others(seal: int) -> None:
    """A client that hangs up leaves pages behind, which the next who asks the same opens with."""
    retention, _ = begun()
    whole(retention, 1, [0], 4, seal)
    assert retention.read(name(1), 0) is None and retention.unauditable == 0
    run(retention, step([(2, 4, 1, [0, 1])], {2: 4}, [(2, 5, SEAL)]))
    assert retention.read(name(2), 0) is not None


def test_a_step_that_failed_leaves_no_record() -> None:
    retention, _ = begun()
    run(retention, step([(1, 0, 3, [0])], {1: 0}))
    retention.saw(step([(1, 3, 1, [])]), None)
    retention.saw(step([], closes=[(1, 3, SEAL)]), None)
    assert retention.read(name(1), 0) is None and (retention.bytes, retention.unauditable) == (0, 1)


def test_the_oldest_that_nobody_drew_goes_first_and_is_counted_while_it_might_have_been_drawn() -> None:
    retention, clock = begun(2 * ONE_PAGE)
    whole(retention, 1, [0], 4)
    assert retention.hold(name(1), 0, promised=True) and not retention.hold(name(9), 0, promised=True)
    whole(retention, 2, [1], 4)
    whole(retention, 3, [2], 4)  # in place of 2: 1 is drawn
    assert retention.read(name(2), 0) is None and retention.read(name(1), 0) and retention.unauditable == 1
    clock.now += HOLD_S + 1
    whole(retention, 4, [3], 4)  # in place of 1, whom nobody fetched
    whole(retention, 5, [0], 4)  # in place of 3, which no draw asks for any more
    assert [retention.read(name(i), 0) is not None for i in range(1, 6)] == [False, False, False, True, True]
    assert (retention.unauditable, retention.timed_out) == (1, 1)


def test_what_is_drawn_without_a_promise_goes_as_if_it_were_the_latest() -> None:
    """Before what was promised, and after what nobody drew."""
    retention, _ = begun(3 * ONE_PAGE)
    for seq in (1, 2, 3):
        whole(retention, seq, [seq], 4)
    retention.hold(name(1), 0, promised=False)
    retention.hold(name(3), 0, promised=True)
    whole(retention, 4, [4], 4)
    assert [retention.read(name(i), 0) is not None for i in range(1, 5)] == [True, False, True, True]
    whole(retention, 5, [5], 4)
    assert [retention.read(name(i), 0) is not None for i in range(1, 6)] == [False, False, True, True, True]


def test_what_is_promised_is_never_dropped_for_what_is_not() -> None:
    """Then the newcomer has no record, and an open one goes before a drawn one."""
    retention, _ = begun(2 * ONE_PAGE)
    whole(retention, 1, [0], 4)
    retention.hold(name(1), 0, promised=True)
    run(retention, step([(2, 0, 4, [1])], {2: 0}))
    whole(retention, 3, [2], 4)
    retention.hold(name(3), 0, promised=True)
    run(retention, step([(2, 4, 1, [4])], closes=[(2, 5, SEAL)]))
    whole(retention, 4, [3], 8)
    assert [retention.read(name(i), 0) is not None for i in range(1, 5)] == [True, False, True, False]
    assert retention.unauditable == 2 and retention.bytes == 2 * ONE_PAGE


def test_another_stage_of_the_process_forgets_what_is_open_and_keeps_what_was_signed_for() -> None:
    retention, _ = begun()
    whole(retention, 1, [0], 4)
    run(retention, step([(2, 0, 4, [1])], {2: 0}))
    retention.begin(0, PAGE)
    assert retention.bytes == ONE_PAGE and retention.read(name(1), 0)
    run(retention, step([(2, 4, 1, [0, 2])], {2: 4}, [(2, 5, SEAL)]))
    assert retention.unauditable == 1
    retention.begin(1, PAGE)  # a spare that has become another stage
    assert retention.bytes == 0 and retention.read(name(1), 0) is None


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=80))
def test_a_record_is_read_back_and_nothing_else_is(received: bytes, sent: bytes, noise: bytes) -> None:
    record = StageRecord(received, sent)
    assert StageRecord.decode(record.encode()) == record
    for wrong in (record.encode() + b"\0", record.encode()[:-1], noise):
        with pytest.raises(ProtocolError):
            StageRecord.decode(wrong)


def root_of(boundary: Boundary, rows: bytes) -> bytes:
    tree = RowTree(boundary)
    tree.append(0, rows)
    return tree.root()


@pytest.mark.parametrize("retain_bytes", [1 << 26, 1 << 17])
def test_every_record_of_a_pipeline_opens_what_its_stage_signed(
    tiny: tuple[MemoryStore, Manifest], retain_bytes: int
) -> None:
    """Shared beginnings, guesses, too few pages: what is kept hashes to both roots, and the bound always holds."""
    store, manifest = tiny
    options = LoadOptions("cpu", "float32", 16, None)
    limits = LocalLimits(
        n_pages=24, max_step_tokens=32, max_running=6, prefix_cache=True, speculate=4, retain_bytes=retain_bytes
    )

    async def main() -> tuple[int, int]:
        pipeline = LocalPipeline(store, manifest, stages=2, options=options, limits=limits)
        opened = missing = 0

        async def one(i: int) -> bytes:
            prompt = tuple(range(3, 40)) + tuple(range(100 + 5 * (i % 4), 112 + 5 * (i % 4)))
            asked = GenerationRequest(
                RequestId(f"r{i}"), manifest.cid, prompt, 20 + i, Sampling(0), (), b"", fresh_salt()
            )
            events = [event async for event in pipeline.generate(asked)]
            assert isinstance(events[-1], FinishedEvent)
            return events[-1].receipt

        try:
            for receipt in await asyncio.gather(*map(one, range(16))):
                for said in check(receipt, pipeline.operator.public, now_s=int(time.time())).statements:
                    retention = pipeline.stages[said.stage].retention
                    assert retention is not None and retention.bytes <= retain_bytes
                    record = retention.read(said.request_hash, said.attempt)
                    if record is None:
                        missing += 1
                        continue
                    outlet = Boundary(manifest.cid, said.stop, "float32", manifest.hidden_size)
                    inlet = Boundary(manifest.cid, said.start, "float32", manifest.hidden_size)
                    inlet = inlet if said.start else ids_boundary(manifest.cid)
                    assert root_of(outlet, record.sent) == said.out_root
                    assert root_of(inlet, record.received) == said.in_root
                    opened += 1
            assert missing == sum(stage.retention.unauditable for stage in pipeline.stages if stage.retention)
        finally:
            pipeline.close()
        return opened, missing

    opened, missing = asyncio.run(main())
    assert opened + missing == 32 and opened and (missing > 0) == (retain_bytes < 1 << 20)
