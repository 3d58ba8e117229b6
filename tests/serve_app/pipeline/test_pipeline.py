"""Head, stages and witnesses in one process: answers, receipts, and what happens when a part lies or breaks."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.engine.engine import Launched
from serve_app.engine.load import LoadOptions
from serve_app.errors import ContextLengthError, PipelineError, RequestError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    TokensEvent,
    fresh_salt,
)
from serve_app.messages.step import StepPlan, StepResult, encode_reply
from serve_app.receipts.check import check, check_against_manifest
from serve_app.receipts.evidence import ERROR_TYPE
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope
from shard_tools.store.memory import MemoryStore

Tiny = tuple[MemoryStore, Manifest]
PAGES = 64


def run(
    tiny: Tiny, stages: int, work: Callable[[LocalPipeline], Awaitable[None]], page_size: int = 4, **limits: int
) -> None:
    """Do `work` on a pipeline; afterwards all pages are back and every thread has ended."""

    async def main() -> None:
        store, manifest = tiny
        options = LoadOptions("cpu", "float32", page_size, None)
        sizes = {"n_pages": PAGES, "max_step_tokens": 16} | limits
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options, limits=LocalLimits(**sizes))
        try:
            await work(pipeline)
            if pipeline.head.failure is None:
                assert pipeline.head.status()["free_pages"] == PAGES
        finally:
            pipeline.close()

    before = set(threading.enumerate())
    asyncio.run(asyncio.wait_for(main(), 60))
    left = [t for t in set(threading.enumerate()) - before if t.name.startswith(("stage-", "witness"))]
    assert not left


def request(manifest: Manifest, name: str = "r", prompt: int = 9, tokens: int = 12, **fields: Any) -> GenerationRequest:
    sampling = fields.pop("sampling", Sampling(0))
    ids = tuple((7 * i + len(name)) % 500 + 3 for i in range(prompt))
    values = {"stop_ids": (), "client_nonce": bytes(32)} | fields
    return GenerationRequest(RequestId(name), manifest.cid, ids, tokens, sampling, salt=fresh_salt(), **values)


async def collect(pipeline: LocalPipeline, asked: GenerationRequest) -> tuple[list[int], Event]:
    tokens: list[int] = []
    async for event in pipeline.generate(asked):
        if isinstance(event, TokensEvent):
            tokens += event.tokens
    return tokens, event


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_many_requests_at_once_each_get_their_own_verified_receipt(tiny: Tiny, stages: int) -> None:
    """Every stage hashes every row; alone or among others, the same greedy tokens."""

    async def work(pipeline: LocalPipeline) -> None:
        asked = [request(tiny[1], f"r{'x' * i}", prompt=3 + 5 * i, tokens=4 + i) for i in range(6)]
        answers = await asyncio.gather(*(collect(pipeline, r) for r in asked))
        for r, (tokens, end) in zip(asked, answers, strict=True):
            assert isinstance(end, FinishedEvent) and end.reason == "length" and len(tokens) == r.max_tokens
            checked = check(end.receipt, pipeline.operator.public, now_s=int(time.time()))
            assert list(checked.receipt.out_ids) == tokens and len(checked.statements) == stages
            check_against_manifest(checked, tiny[1])
        alone = [await collect(pipeline, r) for r in asked]
        assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in answers]
        for stage in pipeline.stages:
            assert stage.witness.rows_hashed == pipeline.head.rows_run

    run(tiny, stages, work, n_pages=PAGES)


def test_a_seed_repeats_alone_and_among_others(tiny: Tiny) -> None:
    """The noise is keyed by the seed alone, whatever runs beside it."""

    async def work(pipeline: LocalPipeline) -> None:
        def seeded(name: str) -> GenerationRequest:
            return request(tiny[1], name, tokens=10, sampling=Sampling(1_000_000, 0, 950_000, 42), prompt=9)

        one, _ = await collect(pipeline, seeded("a"))
        several = await asyncio.gather(*(collect(pipeline, seeded(n)) for n in ("b", "c", "d")))
        # names of one length have one prompt (see `request`)
        assert all(tokens == one for tokens, _ in several)

    run(tiny, 2, work)


def test_a_stop_string_found_by_the_ingress_still_gives_a_receipt_of_all_that_was_drawn(tiny: Tiny) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        tokens: list[int] = []
        async for event in pipeline.generate(request(tiny[1], tokens=100)):
            if isinstance(event, TokensEvent):
                tokens += event.tokens
                if len(tokens) == 3:
                    await pipeline.stop(RequestId("r"))
        assert isinstance(event, FinishedEvent) and event.reason == "stop" and 3 <= len(tokens) < 100
        checked = check(event.receipt, pipeline.operator.public, now_s=int(time.time()))
        assert list(checked.receipt.out_ids) == tokens

    run(tiny, 2, work)


def test_a_reader_that_goes_away_gives_the_pages_back(tiny: Tiny) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        stream = pipeline.generate(request(tiny[1], tokens=150))
        await anext(stream)
        await stream.aclose()
        while pipeline.head.status()["running"] or pipeline.head.status()["steps_in_flight"]:
            await asyncio.sleep(0.01)

    run(tiny, 2, work)


class Tampering:
    """An edge that changes a bit of each step's first row."""

    def __init__(self, beneath: Any) -> None:
        self.beneath = beneath

    def send(self, message: bytes, rows: bytes | memoryview = b"") -> None:
        message = b"".join((message, rows))
        plan, rows = StepPlan.decode(message)
        if plan.rows:
            altered = bytearray(rows)
            altered[0] ^= 1
            message = plan.encode(bytes(altered))
        self.beneath.send(message)

    def close(self) -> None: ...


def test_rows_altered_between_two_stages_end_the_request_with_a_signed_error_and_no_receipt(tiny: Tiny) -> None:
    """Sender and receiver each hash their own copy; when the roots differ nobody signs a statement."""

    async def work(pipeline: LocalPipeline) -> None:
        pipeline.stages[0]._next = Tampering(pipeline.stages[0]._next)
        _, end = await collect(pipeline, request(tiny[1]))
        assert isinstance(end, FailedEvent) and end.kind == "integrity"
        assert "stage 1 received other rows than stage 0 sent" in end.message
        envelope = Envelope.from_value(canonical.decode(end.evidence, max_bytes=10_000), "error", 10_000)
        said = canonical.decode(envelope.open(ERROR_TYPE, frozenset([envelope.key]), "the head"), max_bytes=10_000)
        assert isinstance(said, dict) and said["error"] == end.message

    run(tiny, 2, work)


def test_a_beginning_that_was_altered_once_is_computed_anew_for_the_next(tiny: Tiny) -> None:
    """Else whoever asks with the same beginning would be refused, for as long as somebody asks."""

    async def work(pipeline: LocalPipeline) -> None:
        sound = pipeline.stages[0]._next
        pipeline.stages[0]._next = Tampering(sound)
        _, end = await collect(pipeline, request(tiny[1], prompt=40))
        assert isinstance(end, FailedEvent) and end.kind == "integrity"
        pipeline.stages[0]._next = sound
        for cached in (0, 32):
            _, end = await collect(pipeline, request(tiny[1], prompt=40))
            assert isinstance(end, FinishedEvent)
            check(end.receipt, pipeline.operator.public, now_s=int(time.time()))
            assert pipeline.head.status()["cached_tokens"] == cached

    run(tiny, 2, work, page_size=16, prefix_cache=True)


def test_a_step_that_fails_in_one_stage_ends_its_requests_and_no_others(tiny: Tiny) -> None:
    """The pipeline goes on: later requests are answered, and pages come back."""

    async def work(pipeline: LocalPipeline) -> None:
        engine = pipeline.stages[1]._engine
        sound = engine.launch

        def broken(plan: StepPlan, rows: memoryview) -> Launched:
            if plan.rows:
                raise MemoryError("no room for activations")
            return sound(plan, rows)

        engine.launch = broken  # type: ignore[method-assign]
        _, end = await collect(pipeline, request(tiny[1]))
        assert isinstance(end, FailedEvent) and end.kind == "pipeline" and "no room for activations" in end.message
        engine.launch = sound  # type: ignore[method-assign]
        tokens, end = await collect(pipeline, request(tiny[1]))
        assert isinstance(end, FinishedEvent) and len(tokens) == 12

    run(tiny, 2, work)


def test_a_step_that_fails_behind_the_end_of_an_answer_costs_it_no_receipt(tiny: Tiny) -> None:
    """With lookahead a row of the last token may be on its way: void, and so is its failing."""

    async def work(pipeline: LocalPipeline) -> None:
        whole, _ = await collect(pipeline, request(tiny[1]))
        last = next(i for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
        engine, n_failed = pipeline.stages[0]._engine, 0
        sound = engine.launch

        def broken(plan: StepPlan, rows: memoryview) -> Launched:
            nonlocal n_failed
            if len(plan.spans) and int(plan.spans["start"][0]) >= 9 + last:
                n_failed += 1
                raise RuntimeError("out of memory, say")
            return sound(plan, rows)

        engine.launch = broken  # type: ignore[method-assign]
        tokens, end = await asyncio.wait_for(collect(pipeline, request(tiny[1], stop_ids=(whole[last],))), 10)
        assert n_failed and tokens == whole[: last + 1] and isinstance(end, FinishedEvent) and end.reason == "stop"
        checked = check(end.receipt, pipeline.operator.public, now_s=int(time.time()))
        assert list(checked.receipt.out_ids) == tokens
        assert not pipeline.stages[0].witness._open

    run(tiny, 1, work)


def test_a_step_that_never_comes_back_fails_the_pipeline_instead_of_hanging(tiny: Tiny) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        release = threading.Event()
        engine = pipeline.stages[1]._engine
        sound = engine.launch

        def hanging(plan: StepPlan, rows: memoryview) -> Launched:
            release.wait(30)
            return sound(plan, rows)

        engine.launch = hanging  # type: ignore[method-assign]
        asked = asyncio.create_task(collect(pipeline, request(tiny[1])))
        await asyncio.sleep(0.1)
        pipeline.head._started = {step: began - 61 for step, began in pipeline.head._started.items()}
        pipeline.head.watch()
        _, end = await asked
        release.set()
        assert isinstance(end, FailedEvent) and "more than 60 s" in end.message
        with pytest.raises(PipelineError, match="being rebuilt"):
            await collect(pipeline, request(tiny[1]))

    run(tiny, 2, work)


def test_a_pipeline_whose_keys_run_out_is_given_up_before_it_signs_what_nobody_can_verify(tiny: Tiny) -> None:
    """Its Supervisor then makes one with fresh keys."""

    async def work(pipeline: LocalPipeline) -> None:
        pipeline.head.watch()
        assert pipeline.head.failure is None
        soon = dataclasses.replace(pipeline.head._facts, expires_s=int(time.time()) + 10)
        pipeline.head._facts = soon
        pipeline.head.watch()
        with pytest.raises(PipelineError, match="run out"):
            await collect(pipeline, request(tiny[1]))

    run(tiny, 2, work)


def test_messages_of_another_epoch_are_ignored(tiny: Tiny) -> None:
    """What a pipeline that was sent late must not disturb the one that is."""

    async def work(pipeline: LocalPipeline) -> None:
        stale = StepPlan.decode(_empty_plan(epoch=99).encode(b""))[0]
        pipeline.stages[0].deliver(stale.encode(b""))
        pipeline.head.deliver(encode_reply(StepResult(99, 0, (1,))))
        tokens, _ = await collect(pipeline, request(tiny[1]))
        assert len(tokens) == 12 and pipeline.head.failure is None

    run(tiny, 2, work)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": 510, "tokens": 12}, ContextLengthError, "This model's maximum context length is 512 tokens"),
        ({"prompt": 0}, RequestError, "empty"),
        ({"prompt": 200, "tokens": 300}, RequestError, "this pipeline has room for"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    tiny: Tiny, changes: dict[str, int], error: type[Exception], message: str
) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        with pytest.raises(error, match=message):
            await collect(pipeline, request(tiny[1], **changes))

    run(tiny, 1, work)


def test_another_models_request_is_refused(tiny: Tiny) -> None:
    async def work(pipeline: LocalPipeline) -> None:
        other = GenerationRequest(
            RequestId("r"), Cid.of(Codec.DAG_CBOR, b"x"), (5,), 1, Sampling(0), (), b"", fresh_salt()
        )
        with pytest.raises(RequestError, match="serves"):
            await collect(pipeline, other)

    run(tiny, 1, work)


def _empty_plan(epoch: int) -> StepPlan:
    from serve_app.messages.step import closing_plan

    return closing_plan(epoch, 1, 1)


def test_a_level_that_nobody_stands_behind_is_refused_and_one_that_is_set_aside_for_is_let_go_again(
    tiny: Tiny,
) -> None:
    """Never lowered. Whoever sees to audits hears of every end, with its receipt if there is one."""
    heard: list[tuple[str, bool]] = []

    class Noting:
        def admit(self, request: GenerationRequest, *, resumed: bool) -> None:
            heard.append((request.id, resumed))

        def ended(self, request: GenerationRequest, receipt: bytes) -> None:
            heard.append((request.id, receipt != b""))

    async def work(pipeline: LocalPipeline) -> None:
        with pytest.raises(RequestError) as refused:
            await collect(pipeline, request(tiny[1], "none", assurance="audited"))
        assert refused.value.param == "llmd.assurance"
        pipeline.head._audits = Noting()
        _, end = await collect(pipeline, request(tiny[1], "sure", assurance="audited"))
        assert isinstance(end, FinishedEvent)
        said = check(end.receipt, pipeline.operator.public, now_s=int(time.time())).receipt
        assert said.assurance == "audited"
        pipeline.head.submit(request(tiny[1], "gone", assurance="audited"), lambda event: None)
        pipeline.head.stop(RequestId("gone"), keep=False)
        for _ in range(100):
            await asyncio.sleep(0.02)
            if len(heard) == 4:
                break
        assert heard == [("sure", False), ("sure", True), ("gone", False), ("gone", False)]

    run(tiny, 2, work)
