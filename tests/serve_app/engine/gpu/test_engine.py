"""The GPU engine gives what the plain engine gives, step by step; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.block import NotFusable
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.stage_weights import read_weights
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import DRAWN_LAST, StepPlan
from serve_app.receipts.rows import Boundary, ids_boundary, leaves_of
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.serve_app.engine.steps import PAGE, REFUSED, STEPS, ids, plan_of, published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def engines(
    store: MemoryStore, manifest: Manifest, start: int = 0, stop: int | None = None
) -> tuple[TorchEngine, GpuEngine]:
    stop = manifest.n_layers if stop is None else stop
    options = LoadOptions(DEVICE, "float32", PAGE, None, fused=False)
    plain, other = (load_engine(store, manifest, start, stop, options) for _ in range(2))
    assert isinstance(plain, TorchEngine) and isinstance(other, TorchEngine)
    fused = GpuEngine(other, read_weights(other, PAGE), PAGE)
    for engine in (plain, fused):
        engine.reserve(40, 3)
    return plain, fused


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    return published(tmp_path_factory.mktemp("tiny"), "llama")


OTHERS = ["llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3"]


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_equals_the_plain_engine_step_by_step(family: str, tmp_path: Path) -> None:
    """Tokens and the ids they came from are equal; rows within rounding of float32; the hashes are of these bytes."""
    store, manifest = published(tmp_path, family)
    plain, fused = engines(store, manifest)
    inlet, outlet = ids_boundary(manifest.cid), Boundary(manifest.cid, 2, "float32", manifest.hidden_size)
    assert fused.hash_rows(inlet.leaf_prefix, outlet.leaf_prefix, hand_on=True)
    for plan, rows in STEPS:
        wanted, found = plain.run(plan, rows), fused.run(plan, rows)
        assert found.tokens == wanted.tokens
        if found.digests is not None:
            spans = [(start, count) for _, start, count, _, _ in plan.spans.tolist()]
            for boundary, data, leaves in zip(
                (inlet, outlet), (found.received, found.hidden), found.digests.wait(), strict=True
            ):
                assert bytes(leaves) == leaves_of(boundary, spans, data)
        assert bytes(found.received) == bytes(wanted.received)
        expected, got = (np.frombuffer(out.hidden, "<f4") for out in (wanted, found))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(np.abs(expected).max(initial=0), 1))


def test_a_range_without_embedding_and_one_without_head_make_the_whole(tiny: tuple[MemoryStore, Manifest]) -> None:
    store, manifest = tiny
    plain, _ = engines(store, manifest)
    (_, first), (_, second) = engines(store, manifest, 0, 1), engines(store, manifest, 1, 2)
    for plan, rows in (s for s in STEPS if DRAWN_LAST not in np.frombuffer(s[1], "<u4")):
        if len(plan.spans) and int(plan.spans["start"][0]) > 5:
            continue
        wanted = plain.run(plan, rows)
        between = first.run(plan, rows)
        assert between.tokens == ()
        found = second.run(plan, between.hidden)
        assert found.tokens == wanted.tokens and bytes(found.received) == bytes(between.hidden)


def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(tiny: tuple[MemoryStore, Manifest]) -> None:
    """After each the sequence goes on as if nothing had been asked."""
    plain, fused = engines(*tiny)
    begin = plan_of([(7, 0, 3, [0], 1)], {7: (0, 0, 10**6)})
    assert fused.run(begin, ids(1, 2, 3)).tokens == plain.run(begin, ids(1, 2, 3)).tokens
    for plan, rows, message in REFUSED:
        with pytest.raises(ProtocolError, match=message):
            fused.run(plan, rows)
    after = plan_of([(7, 3, 1, [], 1)])
    assert fused.run(after, ids(4)).tokens == plain.run(after, ids(4)).tokens


ONE = {8: (0, 0, 10**6)}
NO_SUCH_BEGINNING: list[tuple[StepPlan, memoryview, str]] = [
    (plan_of([(8, 3, 1, [0], 1)], ONE, cached=(3,)), ids(5), "opens behind 3 rows"),
    (plan_of([(7, 4, 1, [1], 1)], ONE, cached=(4,)), ids(5), "opens behind 4 rows and runs none"),
    (plan_of([(8, 0, 1, [0], 1)], ONE, cached=(4,)), ids(5), "goes on at"),
    (plan_of([(8, 5, 1, [0, 1], 1)], ONE, cached=(4,)), ids(5), "goes on at"),
    (plan_of([(8, 4, 1, [0], 1)], ONE, cached=(4,)), ids(5), "too few pages"),
    (plan_of([(8, 4, 1, [50, 1], 1)], ONE, cached=(4,)), ids(5), "page 50 of 40"),
]


def test_an_opening_behind_rows_that_cannot_be_there_is_refused_by_both_engines(
    tiny: tuple[MemoryStore, Manifest],
) -> None:
    """Half a page, no row of its own, a gap, an overlap, a page too few, an unknown one: nothing changed."""
    for engine in engines(*tiny):
        engine.run(plan_of([(7, 0, 4, [0], 1)], {7: (0, 0, 10**6)}), ids(1, 2, 3, 4))
        for plan, rows, message in NO_SUCH_BEGINNING:
            with pytest.raises(ProtocolError, match=message):
                engine.run(plan, rows)
        behind = engine.run(plan_of([(8, 4, 1, [0, 1], 1)], ONE, cached=(4,)), ids(5))
        assert behind.tokens == engine.run(plan_of([(7, 4, 1, [2], 1)]), ids(5)).tokens


def test_logits_that_are_not_finite_are_an_error_of_that_step_alone(tiny: tuple[MemoryStore, Manifest]) -> None:
    _, fused = engines(*tiny)
    embedding = fused._weights.embedding
    assert embedding is not None
    embedding[5] = float("nan")
    spoilt = fused.launch(plan_of([(1, 0, 2, [0], 1)], {1: (0, 0, 10**6)}), ids(5, 6))
    sound = fused.launch(plan_of([(2, 0, 2, [1], 1)], {2: (0, 0, 10**6)}), ids(7, 6))
    with pytest.raises(PipelineError, match="not finite"):
        spoilt.result()
    assert len(sound.result().tokens) == 1


def test_a_model_the_fused_path_does_not_compute_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The plain engine serves it."""
    store, manifest = published(tmp_path, "gpt2")
    plain = load_engine(store, manifest, 0, 2, LoadOptions(DEVICE, "float32", PAGE, None, fused=False))
    assert isinstance(plain, TorchEngine)
    with pytest.raises(NotFusable, match="GPT2Block has no self_attn"):
        read_weights(plain, PAGE)


def test_a_layer_that_computes_something_else_is_found_at_start_up(tiny: tuple[MemoryStore, Manifest]) -> None:
    """Modules that look as expected and differ in what they do."""
    plain = load_engine(*tiny, 0, 2, LoadOptions(DEVICE, "float32", PAGE, None, fused=False))
    assert isinstance(plain, TorchEngine)
    plain.model.layers[1].self_attn.scaling *= 1.1
    inner = plain.model.layers[1].forward
    plain.model.layers[1].forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.05
    with pytest.raises(NotFusable, match="layer 1 of this stage differs"):
        read_weights(plain, PAGE)
