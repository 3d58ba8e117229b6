"""The CPU engine gives what the plain engine gives, step by step, and keeps as still when a plan is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.engine.block import Block, Linear, Norm
from serve_app.engine.cpu.engine import CpuEngine
from serve_app.engine.cpu.layers import layer_of, new_cache, run_layers, step_of
from serve_app.engine.cpu.native import NativeLayer, NativeStage, library
from serve_app.engine.cpu.products import product_of
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.request_table import PlannedSpans
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import PipelineError
from serve_app.messages.step import DRAWN_LAST
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.choice import Choice
from shard_tools.manifest import Manifest
from shard_tools.quantised import Scheme
from shard_tools.store.memory import MemoryStore
from tests.engine_steps import PAGE, STEPS, ids, plan_of, published
from tests.tiny_models import write_tiny_checkpoint

CPU = Choice("cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def engines(
    store: MemoryStore, manifest: Manifest, start: int = 0, stop: int | None = None, native: bool = True
) -> tuple[TorchEngine, CpuEngine]:
    stop = manifest.n_layers if stop is None else stop
    plain, fast = (
        load_engine(store, manifest, start, stop, LoadOptions("cpu", "float32", PAGE, 1, engine, native=native))
        for engine in (TORCH, CPU)
    )
    assert isinstance(plain, TorchEngine) and isinstance(fast, CpuEngine)
    assert fast.is_native == (native and library() is not None)
    for engine in (plain, fast):
        engine.reserve(40, 3)
    return plain, fast


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    return published(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "operators"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_engine_step_by_step(family: str, native: bool, tmp_path: Path) -> None:
    """Tokens and the ids they came from are equal; rows within rounding of float32."""
    plain, fast = engines(*published(tmp_path, family), native=native)
    for plan, rows in STEPS:
        wanted, found = plain.run(plan, rows), fast.run(plan, rows)
        assert found.tokens == wanted.tokens
        assert bytes(found.received) == bytes(wanted.received)
        expected, got = (np.frombuffer(out.hidden, "<f4") for out in (wanted, found))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * max(np.abs(expected).max(initial=0), 1))
        assert len(fast._draws) == len(fast._table._slots), "how a sequence drew is kept behind its end"
        if len(found.hidden):
            logits = [engine.logits_of(found.hidden).numpy() for engine in (plain, fast)]
            np.testing.assert_allclose(logits[1], logits[0], atol=1e-4 * np.abs(logits[0]).max())


def test_a_range_without_embedding_and_one_without_head_make_the_whole(tiny: tuple[MemoryStore, Manifest]) -> None:
    plain, _ = engines(*tiny)
    (_, first), (_, second) = engines(*tiny, 0, 1), engines(*tiny, 1, 2)
    for plan, rows in (s for s in STEPS if DRAWN_LAST not in np.frombuffer(s[1], "<u4")):
        if len(plan.spans) and int(plan.spans["start"][0]) > 5:
            continue
        wanted = plain.run(plan, rows)
        between = first.run(plan, rows)
        assert between.tokens == ()
        found = second.run(plan, between.hidden)
        assert found.tokens == wanted.tokens and bytes(found.received) == bytes(between.hidden)


def test_logits_that_are_not_finite_are_an_error_of_that_step_alone(tiny: tuple[MemoryStore, Manifest]) -> None:
    _, fast = engines(*tiny)
    embedding = fast._weights.stage.embedding
    assert embedding is not None
    embedding.weight[5] = float("nan")
    spoilt = fast.launch(plan_of([(1, 0, 2, [0], 1)], {1: (0, 0, 10**6)}), ids(5, 6))
    sound = fast.launch(plan_of([(2, 0, 2, [1], 1)], {2: (0, 0, 10**6)}), ids(7, 6))
    with pytest.raises(PipelineError, match="not finite"):
        spoilt.result()
    assert len(sound.result().tokens) == 1


def test_a_model_that_no_fused_engine_computes_is_served_by_the_plain_one(tmp_path: Path) -> None:
    store, manifest = published(tmp_path, "gpt2")
    assert isinstance(load_engine(store, manifest, 0, 2, LoadOptions("cpu", "float32", PAGE, None)), TorchEngine)


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "operators"])
def test_bfloat16_logits_are_as_close_as_the_plain_engines(native: bool, tmp_path: Path) -> None:
    """Of a prompt and the rows after it, against the same values in float32; with two threads."""
    store, manifest = published(tmp_path, "llama")
    options = [LoadOptions("cpu", dtype, PAGE, None, TORCH) for dtype in ("float32", "bfloat16")]
    options.append(LoadOptions("cpu", "bfloat16", PAGE, 2, CPU, native=native))
    logits = []
    for engine in (load_engine(store, manifest, 0, 2, option) for option in options):
        assert isinstance(engine, TorchEngine | CpuEngine)
        engine.reserve(40, 3)
        rows = [engine.run(plan_of([(1, 0, 40, list(range(10)), 1)], {1: (0, 0, 10**6)}), ids(*range(40)))]
        for position in range(40, 44):
            new = [10] if position == 40 else []
            rows.append(engine.run(plan_of([(1, position, 1, new, 1)]), ids(position)))
        logits.append(np.concatenate([engine.logits_of(out.hidden).numpy() for out in rows]))
    exact, plain, fast = logits
    for part in (slice(0, 40), slice(40, 44)):
        errors = [np.linalg.norm(found[part] - exact[part]) for found in (plain, fast)]
        assert errors[1] <= 1.5 * errors[0]


def test_pages_in_any_order_are_read_in_the_sequences_order(tiny: tuple[MemoryStore, Manifest]) -> None:
    """One run of pages is a view, others are gathered; the rows are the same."""
    found = []
    for native in (True, False):
        for pages in ([4, 5, 6], [9, 2, 30]):
            _, fast = engines(*tiny, native=native)
            fast.run(plan_of([(1, 0, 9, pages, 1)], {1: (0, 0, 10**6)}), ids(*range(9)))
            found.append(np.frombuffer(fast.run(plan_of([(1, 9, 2, [], 1)]), ids(5, 6)).hidden, "<f4"))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-4 * np.abs(found[0]).max())


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "operators"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_quantised_model_gives_the_values_of_its_integers(scheme: Scheme, native: bool, tmp_path: Path) -> None:
    """In prompts and after, close to what the plain engine gives of the same integers, dequantised, in float32."""
    store = MemoryStore()
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "qwen3", layers=2)
    manifest = split(open_checkpoint(checkpoint), store, "tiny", "bfloat16", scheme=scheme)
    exact = load_engine(store, manifest, 0, 2, LoadOptions("cpu", "float32", PAGE, 1, TORCH))
    fast = load_engine(store, manifest, 0, 2, LoadOptions("cpu", "bfloat16", PAGE, 1, native=native))
    assert isinstance(exact, TorchEngine) and isinstance(fast, CpuEngine)
    prompt = plan_of([(1, 0, 40, list(range(10)), 0), (2, 0, 3, [10], 0)], {1: (0, 0, 10**6), 2: (0, 0, 10**6)})
    after = plan_of([(1, 40, 1, [11], 0), (2, 3, 1, [], 0)])
    found = []
    for engine in (exact, fast):
        engine.reserve(40, 3)
        out = [engine.run(prompt, ids(*range(43))), engine.run(after, ids(7, 9))]
        found.append([engine.logits_of(o.hidden).numpy() for o in out])
    for wanted, got in zip(*found, strict=True):
        assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)


HIDDEN = 64


def block_of(heads: int, kv_heads: int, inner: int) -> Block:
    """A random layer with heads of 16 dimensions."""
    generator, dim = torch.Generator().manual_seed(heads), 16

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    angles = torch.arange(40)[:, None] * torch.rand(dim // 2, generator=generator)
    norm = Norm(1 + random(HIDDEN), 1e-6, False)
    return Block(
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        scale=dim**-0.5,
        softcap=None,
        window=None,
        sinks=None,
        cos=angles.cos(),
        sin=angles.sin(),
        norm_in=norm,
        qkv=Linear(random((heads + 2 * kv_heads) * dim, HIDDEN), None),
        q_norm=None,
        k_norm=None,
        out=Linear(random(HIDDEN, heads * dim), None),
        after_attention=None,
        norm_mid=norm,
        gate_up=Linear(random(2 * inner, HIDDEN), None),
        down=Linear(random(HIDDEN, inner), None),
        after_mlp=None,
        activation="silu",
    )


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", [0, 1])
def test_layers_of_one_stage_may_have_unlike_widths(first: int, threads: int) -> None:
    """Some models have other heads, or another MLP, in every few layers: several rows at once must not overlap."""
    blocks = [block_of(8, 4, 192), block_of(4, 2, 96)]
    blocks = blocks[first:] + blocks[:first]
    slots, zeros, ones = np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones(3, np.int32)
    table = np.arange(6, dtype=np.int32).reshape(3, 2)
    x = torch.randn((3, HIDDEN), generator=torch.Generator().manual_seed(0))
    step = step_of(PlannedSpans(slots, zeros, ones, ones != 0, zeros[:0], zeros[:0], zeros), table, PAGE)
    caches = [new_cache(blocks, 6 * PAGE, torch.float32) for _ in range(2)]
    compiled = [NativeLayer.of(block) for block in blocks]
    plain = [
        layer_of(b, {}, tuple(product_of(m, packs=False) for m in (b.qkv, b.out, b.gate_up, b.down))) for b in blocks
    ]
    wanted = run_layers(plain, caches[0], step, x.clone())
    found = x.clone()
    NativeStage(compiled, caches[1], table, PAGE, hidden=HIDDEN, threads=threads).run(found, slots, zeros, zeros[:0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
