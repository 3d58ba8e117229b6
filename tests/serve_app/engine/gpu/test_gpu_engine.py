"""The GPU engine gives what the plain engine gives, step by step; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.block import NotFusable
from serve_app.engine.engines import TORCH
from serve_app.engine.gpu.decode_rows import decode_rows, leading
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.stage_weights import read_weights
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.request_table import RequestTable
from serve_app.engine.stage_weights import StageWeights
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import DRAW_EACH, DRAWN_LAST
from serve_app.receipts.rows import Boundary, ids_boundary, leaves_of
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.engine_steps import GREEDY, MAX_SEQUENCES, N_PAGES, OPEN_SEVEN, PAGE, STEPS, Step, ids, plan_of, published

pytestmark = pytest.mark.slow  # Triton's interpreter takes seconds for a step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain_engine(store: MemoryStore, manifest: Manifest, start: int = 0, stop: int = 2) -> TorchEngine:
    engine = load_engine(store, manifest, start, stop, LoadOptions(DEVICE, "float32", PAGE, None, TORCH))
    assert isinstance(engine, TorchEngine)
    return engine


def reserved(engine: GpuEngine | TorchEngine) -> GpuEngine | TorchEngine:
    engine.reserve(N_PAGES, MAX_SEQUENCES)
    return engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    return published(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def read(model: tuple[MemoryStore, Manifest]) -> tuple[TorchEngine, StageWeights]:
    """Checked weights: the check is most of an engine's loading time here, so tests that only read them share them."""
    plain = plain_engine(*model)
    return plain, read_weights(plain, PAGE)


@pytest.fixture
def fused(read: tuple[TorchEngine, StageWeights]) -> GpuEngine:
    engine = GpuEngine(*read, PAGE)
    engine.reserve(N_PAGES, MAX_SEQUENCES)
    return engine


FEW: list[Step] = [  # a prompt beside a row that attends as a decode row does, then a replay
    (plan_of([(1, 0, 1, [3], 1), (2, 0, 3, [0], 1)], {1: GREEDY, 2: (800_000, 20, 900_000)}), ids(5, 20, 21, 22)),
    (plan_of([(1, 1, 1, [], 1), (2, 3, 1, [], 1)]), ids(DRAWN_LAST, DRAWN_LAST)),
    # A row and two guesses, of which the second begins a page; then its place is another row's.
    (plan_of([(1, 2, 3, [4], DRAW_EACH)]), ids(50, 51, 52)),
    (plan_of([(1, 4, 1, [], 1)]), ids(53)),
]
FAST = ["qwen3"]  # norms of queries and keys
# gemma2: caps, windows, more norms and GELU
OTHERS = ["gemma2", "llama", "qwen2", "mistral", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        *(pytest.param(f, FEW, id=f"{f}-few") for f in FAST),
        *(pytest.param(f, STEPS, id=f, marks=pytest.mark.slow) for f in FAST + OTHERS),
    ],
)
def test_equals_the_plain_engine_step_by_step(family: str, steps: list[Step], tmp_path: Path) -> None:
    """Tokens and the ids they came from are equal; rows within rounding of float32. In the interpreter a few steps take

    as long as a hundred thousand on a GPU, hence few of them in the fast suite.
    """
    store, manifest = published(tmp_path, family)
    other = plain_engine(store, manifest)
    plain, fused = reserved(plain_engine(store, manifest)), reserved(GpuEngine(other, read_weights(other, PAGE), PAGE))
    for plan, rows in steps:
        wanted, found = plain.run(plan, rows), fused.run(plan, rows)
        assert found.tokens == wanted.tokens
        assert bytes(found.received) == bytes(wanted.received)
        expected, got = (np.frombuffer(out.hidden, "<f4") for out in (wanted, found))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(np.abs(expected).max(initial=0), 1))


def test_a_graph_takes_rows_and_guesses_and_each_page_with_the_row_that_begins_it() -> None:
    table = RequestTable(4, N_PAGES, PAGE, 40, torch.device("cpu"))
    opens = {1: GREEDY, 2: GREEDY, 3: GREEDY}
    begun = table.begin(plan_of([(1, 0, 3, [5], 1), (2, 0, 4, [6], 1), (3, 0, 1, [7, 8], 1)], opens))
    assert leading(begun, 9) == (0, 0)
    guessed = table.begin(plan_of([(1, 3, 4, [9], DRAW_EACH), (3, 1, 1, [], 1), (2, 4, 1, [10], 1)]))
    assert leading(guessed, 9) == (3, 6) and leading(guessed, 5) == (2, 5) and leading(guessed, 3) == (0, 0)
    rows = decode_rows(guessed, PAGE, 10)
    assert rows is not None
    assert rows[1:].tolist() == [[3, 4, 5, 6, 1, 4], [-1, 9, -1, -1, -1, 10]]
    assert rows[0].tolist() == [begun.slots[0]] * 4 + [begun.slots[2], begun.slots[1]]
    again = decode_rows(table.begin(plan_of([(1, 4, 1, [], 1)])), PAGE, 10)  # in a page that it has already
    assert again is not None and again[1:].tolist() == [[4], [-1]]
    assert decode_rows(table.begin(plan_of([(3, 2, 1, [11], 1)])), PAGE, 10) is None  # a page for later


def test_rows_come_to_the_host_for_whoever_keeps_them(fused: GpuEngine) -> None:
    """Those that came in and those that leave, though the next stage might get them another way."""
    assert fused.run(plan_of([(1, 0, 2, [0], 0)], {1: GREEDY}), ids(5, 6)).kept is None
    fused.keep_rows()
    found = fused.run(plan_of([(1, 2, 1, [], 0)], closes=[1]), ids(7))
    assert found.kept is not None
    assert [bytes(part) for part in found.kept] == [bytes(found.received), bytes(found.hidden)]


@pytest.mark.slow
def test_rows_are_hashed_where_they_lie(fused: GpuEngine, model: tuple[MemoryStore, Manifest]) -> None:
    """The digests are of the very bytes that are handed on; one row, since a hash takes the interpreter seconds."""
    manifest = model[1]
    inlet, outlet = ids_boundary(manifest.cid), Boundary(manifest.cid, 2, "float32", manifest.hidden_size)
    assert fused.hash_rows(inlet.leaf_prefix, outlet.leaf_prefix, hand_on=True)
    found = fused.run(plan_of([(1, 0, 1, [3], 0)], {1: GREEDY}), ids(5))
    assert found.digests is not None
    for boundary, data, leaves in zip(
        (inlet, outlet), (found.received, found.hidden), found.digests.wait(), strict=True
    ):
        assert bytes(leaves) == leaves_of(boundary, [(0, 1)], data)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((plan_of([(8, 0, 1, [1], 1)], {seq: GREEDY for seq in range(8, 40)}), ids(5)), "there is room for"),
        ((plan_of([(7, 3, 600, list(range(2, 39)) * 5, 1)]), memoryview(bytes(2400))), "grows beyond 512"),
    ],
)
def test_more_than_there_is_room_for_is_refused(fused: GpuEngine, step: Step, message: str) -> None:
    fused.run(*OPEN_SEVEN)
    with pytest.raises(ProtocolError, match=message):
        fused.run(*step)


def test_logits_that_are_not_finite_are_an_error_of_that_step_alone(read: tuple[TorchEngine, StageWeights]) -> None:
    plain, weights = read
    assert weights.embedding is not None
    embedding = weights.embedding.weight.clone()
    embedding[5] = float("nan")
    fused = GpuEngine(plain, replace(weights, embedding=replace(weights.embedding, weight=embedding)), PAGE)
    fused.reserve(N_PAGES, MAX_SEQUENCES)
    spoilt = fused.launch(plan_of([(1, 0, 2, [0], 1)], {1: GREEDY}), ids(5, 6))
    sound = fused.launch(plan_of([(2, 0, 2, [1], 1)], {2: GREEDY}), ids(7, 6))
    with pytest.raises(PipelineError, match="not finite"):
        spoilt.result()
    assert len(sound.result().tokens) == 1


def test_a_model_the_fused_path_does_not_compute_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The plain engine serves it."""
    store, manifest = published(tmp_path, "gpt2")
    plain = plain_engine(store, manifest)
    with pytest.raises(NotFusable, match="GPT2Block has no self_attn"):
        read_weights(plain, PAGE)


def test_a_layer_that_computes_something_else_is_found_at_start_up(model: tuple[MemoryStore, Manifest]) -> None:
    """Modules that look as expected and differ in what they do."""
    plain = plain_engine(*model)
    plain.model.layers[1].self_attn.scaling *= 1.1
    inner = plain.model.layers[1].forward
    plain.model.layers[1].forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.05
    with pytest.raises(NotFusable, match="layer 1 of this stage differs"):
        read_weights(plain, PAGE)
