"""Rows and tokens pass between two GPU engines past the host. The driver here is one of plain memory, everything else

the real thing; benchmarks/gpu_serving.py runs it on real GPUs and fails if a row's digests differ.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import struct
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.engines import TORCH
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.lent_rows import Driver, Inbox, Offer, Outbox, Reference
from serve_app.engine.gpu.port import Port
from serve_app.engine.gpu.stage_weights import read_weights
from serve_app.engine.load import LoadOptions
from serve_app.errors import PipelineError, ProtocolError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import FinishedEvent, GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt
from serve_app.messages.step import DRAWN_LAST
from serve_app.receipts.check import check
from shard_tools.choice import Choice
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.engine_steps import GREEDY, MAX_SEQUENCES, N_PAGES, PAGE, ids, plan_of, published
from tests.serve_app.engine.gpu.test_gpu_engine import plain_engine

CPU = torch.device("cpu")
_SHARED: dict[bytes, ctypes.Array[ctypes.c_char]] = {}


class MemoryDriver(Driver):
    """Nothing is queued: a copy is made at once, and who awaits a stamp waits here, without whatever lock it holds."""

    def __init__(self, turn: threading.Lock | None = None) -> None:
        self.turn = turn

    def works_on(self, device: torch.device) -> bool:
        return True

    def allocate(self, n_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(n_bytes)
        address = ctypes.addressof(buffer)
        _SHARED[address.to_bytes(64, "little")] = buffer
        return address

    def share(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def map(self, handle: bytes) -> tuple[int, int]:
        if handle not in _SHARED:
            raise PipelineError("no such memory")
        return int.from_bytes(handle, "little"), len(_SHARED[handle])

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        ctypes.memmove(to, source, n_bytes)

    def await_stamp(self, address: int, number: int) -> None:
        if self.turn is not None:
            self.turn.release()
        for _ in range(20_000):
            found = ctypes.c_uint32.from_address(address).value
            if (found - number) & 0xFFFFFFFF < 0x80000000:
                break
            time.sleep(0.001)
        else:
            raise AssertionError(f"waited for {number} for ever")
        if self.turn is not None:
            self.turn.acquire()

    def synchronize(self, device: torch.device) -> None:
        pass


def pair(places: int = 3, place_bytes: int = 64) -> tuple[Inbox, Outbox]:
    inbox = Inbox(MemoryDriver(), places, place_bytes)
    return inbox, Outbox(MemoryDriver(), Offer.decode(inbox.offer.encode()), CPU)


@given(st.binary(min_size=64, max_size=64), st.integers(1, 1 << 20), st.integers(1, 1 << 14))
def test_an_offer_is_read_as_it_was_written(handle: bytes, places: int, place_bytes: int) -> None:
    offer = Offer(handle, places, place_bytes)
    if places * place_bytes <= 16 << 30:
        assert Offer.decode(offer.encode()) == offer


@given(st.binary(max_size=120))
def test_other_bytes_are_no_offer_and_no_reference(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Offer.decode(data)
    assert Reference.decode(data) is None


def test_offers_are_bounded() -> None:
    for places, size in ((0, 5), (1 << 40, 1 << 20), (5, 0)):
        with pytest.raises(ProtocolError, match="an inbox of"):
            Offer.decode(Offer(bytes(64), places, size).encode())


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 40))
def test_a_reference_is_read_as_it_was_written_and_is_never_as_long_as_rows(number: int, n_bytes: int) -> None:
    encoded = Reference(number, n_bytes).encode()
    assert Reference.decode(memoryview(encoded)) == Reference(number, n_bytes)
    assert len(encoded) % 2 == 1


def test_what_is_put_is_taken_in_its_turn() -> None:
    """Numbers go round at 2^32 and places every three."""
    inbox, outbox = pair()
    for number in (1, 2, 3, 4, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1):
        content = torch.arange(16, dtype=torch.int32) + number % 1000
        out = torch.zeros_like(content)
        outbox.put(number, content)
        inbox.take(number, out)
        assert torch.equal(out, content)
    assert outbox.holds(torch.zeros(16, dtype=torch.int32)) and not outbox.holds(torch.zeros(17, dtype=torch.int32))


def test_who_takes_waits_for_the_stamp() -> None:
    inbox, outbox = pair()
    out = torch.zeros(4, dtype=torch.int32)
    taking = threading.Thread(target=inbox.take, args=(5, out))
    taking.start()
    outbox.put(4, torch.ones(4, dtype=torch.int32))
    time.sleep(0.05)
    assert taking.is_alive()
    outbox.put(5, torch.full((4,), 7, dtype=torch.int32))
    taking.join(10)
    assert out.tolist() == [7] * 4


def test_memory_smaller_than_offered_is_refused() -> None:
    inbox, _ = pair()
    with pytest.raises(ProtocolError, match="an inbox of"):
        Outbox(MemoryDriver(), Offer(inbox.offer.handle, 300, 64), CPU)
    with pytest.raises(PipelineError):
        Outbox(MemoryDriver(), Offer(b"\1" * 64, 3, 64), CPU)


def join(kind: str, sender: GpuEngine, receiver: GpuEngine) -> None:
    """As serve_app/cluster/wiring.py."""
    offer = receiver._port.offer_inbox(kind, 5, MAX_SEQUENCES)  # type: ignore[arg-type]
    assert offer is not None and sender.try_outbox(kind, offer)  # type: ignore[arg-type]
    assert receiver.got_probe(kind)  # type: ignore[arg-type]
    sender.use_outbox(kind)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    return published(tmp_path_factory.mktemp("tiny"))


def halves(model: tuple[MemoryStore, Manifest]) -> tuple[GpuEngine, GpuEngine]:
    engines = []
    for start in (0, 1):
        plain = plain_engine(*model, start, start + 1)
        engine = GpuEngine(plain, read_weights(plain, PAGE), PAGE)
        engine.reserve(N_PAGES, MAX_SEQUENCES)
        engine._port = Port(CPU, model[1].vocab_size, MemoryDriver())
        engines.append(engine)
    return engines[0], engines[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of plain memory has no GPU")
def test_two_engines_pass_rows_down_and_tokens_back(model: tuple[MemoryStore, Manifest]) -> None:
    """The first runs rows of tokens that the last has not drawn yet, and the tokens are those of one engine."""
    steps = [
        plan_of([(1, 0, 1, [3], 1), (2, 0, 3, [0], 1)], {1: GREEDY, 2: (800_000, 20, 900_000)}),
        plan_of([(2, 3, 1, [], 1), (1, 1, 1, [], 1)]),
        plan_of([(1, 2, 1, [], 1)]),
    ]
    for number, plan in enumerate(steps):
        object.__setattr__(plan, "step", number)
    rows = [ids(5, 20, 21, 22), ids(DRAWN_LAST, DRAWN_LAST), ids(DRAWN_LAST)]
    whole = plain_engine(*model)
    whole.reserve(N_PAGES, MAX_SEQUENCES)
    wanted = [whole.run(plan, ids_) for plan, ids_ in zip(steps, rows, strict=True)]

    first, last = halves(model)
    join("rows", first, last)
    join("tokens", last, first)
    lent: list[bytes | None] = []

    def run_first() -> None:
        for plan, given_rows in zip(steps, rows, strict=True):
            lent.append(first.launch(plan, given_rows).lent)

    ahead = threading.Thread(target=run_first)
    ahead.start()
    time.sleep(0.5)
    assert ahead.is_alive(), "the second step waits for tokens of the first"
    for i, plan in enumerate(steps):
        while len(lent) <= i:
            time.sleep(0.001)
        reference = lent[i]
        assert reference is not None and Reference.decode(reference) is not None
        out = last.launch(plan, memoryview(reference)).result()
        assert out.tokens == wanted[i].tokens
        expected, got = (np.frombuffer(hidden, "<f4") for hidden in (wanted[i].hidden, out.hidden))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    ahead.join(10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of plain memory has no GPU")
def test_a_step_that_failed_leaves_nobody_waiting(model: tuple[MemoryStore, Manifest]) -> None:
    """The last stage is told of its ending only; the first stage goes on with what it needs of later ones."""
    first, last = halves(model)
    join("tokens", last, first)
    plan = plan_of([(1, 0, 1, [3], 1)], {1: GREEDY})
    first.launch(plan, ids(5))
    last.launch(plan.endings(), memoryview(b""))
    following = plan_of([(1, 1, 1, [], 1)])
    object.__setattr__(following, "step", plan.step + 1)
    assert first.launch(following, ids(DRAWN_LAST)).lent is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of plain memory has no GPU")
def test_a_reference_to_rows_of_before_or_of_another_size_is_refused(model: tuple[MemoryStore, Manifest]) -> None:
    first, last = halves(model)
    join("rows", first, last)
    plan = plan_of([(1, 0, 1, [3], 1)], {1: GREEDY})
    reference = Reference.decode(first.launch(plan, ids(5)).lent or b"")
    assert reference is not None
    for wrong in (Reference(reference.number - 1, reference.n_bytes), Reference(reference.number, 1)):
        with pytest.raises(ProtocolError):
            last.launch(plan, memoryview(wrong.encode()))
    assert len(last.launch(plan, memoryview(reference.encode())).result().tokens) == 1


class HostHasher:
    """What RowHasher computes, by hashlib: in the interpreter a row takes it seconds."""

    def __init__(self, prefix: bytes, row_bytes: int, device: torch.device) -> None:
        self._prefix = prefix

    def hash(self, rows: torch.Tensor, positions: torch.Tensor, digests: torch.Tensor) -> None:
        for row, position, digest in zip(rows, positions.tolist(), digests, strict=True):
            said = self._prefix + struct.pack("<Q", position) + row.reshape(-1).numpy().tobytes()
            digest.copy_(torch.from_numpy(np.frombuffer(hashlib.sha256(said).digest(), np.int32).copy()))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of plain memory has no GPU")
def test_a_pipeline_whose_stages_pass_everything_past_the_host(
    model: tuple[MemoryStore, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head, scheduler, stages and witnesses: the answers of the plain pipeline, with receipts that verify."""
    monkeypatch.setattr("serve_app.engine.gpu.engine.RowHasher", HostHasher)

    async def answers(engine: Choice, gpus: bool) -> list[list[int]]:
        store, manifest = model
        options = LoadOptions("cpu", "float32", PAGE, None, engine)
        limits = LocalLimits(n_pages=40, max_step_tokens=16, max_running=3)
        pipeline = LocalPipeline(store, manifest, stages=2, options=options, limits=limits)
        if gpus:
            engines: list[Any] = [stage._engine for stage in pipeline.stages]
            turn, driver = threading.Lock(), MemoryDriver()  # the interpreter has one grid for all threads

            def in_turn(launch: Any, *given: Any) -> Any:
                with turn:
                    return launch(*given)

            for one in engines:
                hand_on = one._port.hand_on
                one._port = Port(CPU, manifest.vocab_size, driver)
                one._port.hand_on = hand_on
                one.launch = partial(in_turn, one.launch)
            join("rows", *engines)
            join("tokens", *reversed(engines))
            driver.turn = turn
            pipeline.stages[0].hand_on_early()
            pipeline.head.look_ahead()

        async def ask(name: str, prompt: int, tokens: int) -> list[int]:
            ids_ = tuple((7 * i + len(name)) % 50 + 3 for i in range(prompt))
            nonce = bytes(32)
            request = GenerationRequest(
                RequestId(name), manifest.cid, ids_, tokens, Sampling(0), (), nonce, salt=fresh_salt()
            )
            found: list[int] = []
            async for event in pipeline.generate(request):
                if isinstance(event, TokensEvent):
                    found += event.tokens
            assert isinstance(event, FinishedEvent)
            receipt = check(event.receipt, pipeline.operator.public, now_s=int(time.time())).receipt
            assert list(receipt.out_ids) == found
            return found

        try:
            return await asyncio.gather(ask("a", 3, 4), ask("bb", 1, 3), ask("ccc", 2, 2))
        finally:
            pipeline.close()

    assert asyncio.run(answers(Choice("gpu"), True)) == asyncio.run(answers(TORCH, False))
