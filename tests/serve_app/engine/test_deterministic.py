"""With the switch on, a sequence's rows and logits have the same bits in every mix of batches, chunks and orders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from serve_app.engine.engine import ActivationDtype
from serve_app.engine.engines import TORCH
from serve_app.engine.fixed_windows import SIZES, fitting_size, processor
from serve_app.engine.load import LoadOptions, load_engine, load_head
from serve_app.engine.output_head import head_profile
from serve_app.engine.torch_engine import TorchEngine
from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

PAGE, VOCAB, N_SEQUENCES = 4, 130, 5
Bits = dict[int, npt.NDArray[np.uint8]]


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def published(folder: Path, family: str = "llama", hidden: int = 64) -> tuple[MemoryStore, Manifest]:
    store = MemoryStore()
    checkpoint = write_tiny_checkpoint(folder / family / str(hidden), family, layers=2, vocab=VOCAB, hidden=hidden)
    return store, split(open_checkpoint(checkpoint), store, "tiny", "float32")


def engine_of(model: tuple[MemoryStore, Manifest], dtype: ActivationDtype, deterministic: bool) -> TorchEngine:
    engine = load_engine(*model, 0, 2, LoadOptions("cpu", dtype, PAGE, None, TORCH, deterministic))
    assert isinstance(engine, TorchEngine)
    return engine


PROMPTS = {seq: np.random.default_rng(seq).integers(0, VOCAB, 5 + 7 * seq).astype("<u4") for seq in range(N_SEQUENCES)}


def run_mixed(engine: TorchEngine, seed: int) -> tuple[Bits, Bits]:
    """Every sequence once, in random chunks (often of one row), company and order: hidden and logit bytes by seq."""
    rng = np.random.default_rng(seed)
    engine.reserve(200, N_SEQUENCES)
    done = dict.fromkeys(PROMPTS, 0)
    pages = iter(rng.permutation(200).tolist())
    held = dict.fromkeys(PROMPTS, 0)
    hidden: dict[int, list[bytes]] = {seq: [] for seq in PROMPTS}
    logits: dict[int, list[bytes]] = {seq: [] for seq in PROMPTS}
    while unfinished := [seq for seq in PROMPTS if done[seq] < len(PROMPTS[seq])]:
        company = rng.permutation(unfinished)[: rng.integers(1, len(unfinished) + 1)].tolist()
        spans, new_pages, rows, opens, closes = [], [], [], [], []
        for seq in company:
            left = len(PROMPTS[seq]) - done[seq]
            count = min(left, int(rng.choice([1, 1, 2, 5, 20])))
            need = -(-(done[seq] + count) // PAGE) - held[seq]
            if done[seq] == 0:
                opens.append(seq)
            spans.append((seq, done[seq], count, need, 0))
            new_pages += [next(pages) for _ in range(need)]
            rows.append(PROMPTS[seq][done[seq] : done[seq] + count])
            done[seq], held[seq] = done[seq] + count, held[seq] + need
            if done[seq] == len(PROMPTS[seq]):
                closes.append((seq, 0, 0))
        opening = np.zeros(len(opens), OPEN)
        opening["seq"] = opens
        plan = StepPlan(
            1,
            0,
            opening,
            np.array(spans, SPAN),
            np.array(new_pages, "<u4"),
            np.array(closes, CLOSE),
            np.zeros(0, "<u8"),
        )
        out = engine.run(plan, np.concatenate(rows).view(np.uint8).data).hidden
        scores = engine.logits_of(out).numpy().view(np.uint8)
        at, width = 0, len(out) // plan.rows
        for seq, _, count, _, _ in spans:
            hidden[seq].append(bytes(out[at * width : (at + count) * width]))
            logits[seq].append(scores[at : at + count].tobytes())
            at += count
    return tuple(  # type: ignore[return-value]
        {seq: np.frombuffer(b"".join(parts), np.uint8) for seq, parts in found.items()} for found in (hidden, logits)
    )


def differing(a: Bits, b: Bits) -> int:
    return sum(not np.array_equal(a[seq], b[seq]) for seq in a)


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_mixes_give_equal_bits_with_the_switch(tmp_path: Path, dtype: ActivationDtype, n_threads: int) -> None:
    with threads(n_threads):
        engine = engine_of(published(tmp_path), dtype, True)
        assert f"windows of {SIZES[0]} rows, {n_threads} threads" in engine.profile.description
        first = run_mixed(engine, 0)
        for seed in range(1, 4):
            for one, other in zip(first, run_mixed(engine, seed), strict=True):
                assert differing(one, other) == 0


def test_without_the_switch_they_differ(tmp_path: Path) -> None:
    """So the test above tests something. bfloat16's products happen to be equal at this width, its attention is not."""
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(published(tmp_path), dtype, False)
        runs = [run_mixed(engine, seed)[0] for seed in range(4)]
        assert any(differing(runs[0], run) for run in runs[1:]), dtype


@pytest.mark.parametrize(
    ("family", "hidden"),
    [("gemma2", 64), ("qwen3", 80), ("gpt2", 72), ("gpt_oss", 64), ("qwen3_moe", 64), ("mixtral", 64)],
)
def test_other_families_and_odd_widths_too(tmp_path: Path, family: str, hidden: int) -> None:
    """Caps and windows; widths that are no multiple of a vector; biases and layer norms; sinks; experts."""
    engine = engine_of(published(tmp_path, family, hidden), "float32", True)
    assert ("windows of 1 rows" in engine.profile.description) == (family in ("gpt_oss", "qwen3_moe", "mixtral"))
    first = run_mixed(engine, 0)
    assert all(differing(a, b) == 0 for seed in (1, 2) for a, b in zip(first, run_mixed(engine, seed), strict=True))


def test_it_computes_the_same_as_without_but_for_rounding(tmp_path: Path) -> None:
    model = published(tmp_path)
    exact, fast = (run_mixed(engine_of(model, "float32", on), 0)[0] for on in (True, False))
    for seq in PROMPTS:
        np.testing.assert_allclose(exact[seq].view("<f4"), fast[seq].view("<f4"), rtol=1e-3, atol=1e-3)


def test_a_head_alone_gives_the_logits_of_a_deterministic_last_stage(tmp_path: Path) -> None:
    """To the bit, however many rows it is given at once: what an auditor draws again by."""
    model = published(tmp_path)
    options = LoadOptions("cpu", "float32", PAGE, None, TORCH, True)
    head, engine = load_head(*model, options), engine_of(model, "float32", True)
    assert head.profile == head_profile(engine.profile.description)
    rows = np.random.default_rng(3).standard_normal((37, 64)).astype("<f4")
    whole = engine.logits_of(rows.view(np.uint8).reshape(-1).data).numpy()
    for n in (1, 5, 16, 37):
        assert np.array_equal(np.stack(list(head.logits(rows[:n]))), whole[:n])


def test_a_processor_is_told_by_all_that_kernels_are_chosen_by(tmp_path: Path) -> None:
    """Not by its speed, nor by flags that no kernel looks at; of a machine of another kind, by what there is."""
    x86 = "model name\t: A Chip\ncpu family\t: 6\nmodel\t: 9\nstepping\t: 1\ncpu MHz\t: {}\nflags\t: {}\n"
    named = []
    for i, text in enumerate(
        (
            x86.format(1000, "fpu avx2 avx512f") + x86.format(900, "fpu"),
            x86.format(2000, "avx512f avx2 new"),
            x86.format(1000, "fpu avx2"),
            "Features\t: asimd sve\nCPU part\t: 0xd40\n",
        )
    ):
        path = tmp_path / str(i)
        path.write_text(text)
        named.append(processor(path))
    assert named[0] == named[1] != named[2] and named[0].startswith("A Chip 6.9.1 ")
    assert named[3].startswith("processor 0xd40 ") and max(map(len, named)) < 100


def test_a_window_whose_places_are_not_equal_is_not_used() -> None:
    """Of a machine whose products depend on the place above four rows, and of one on which they always do."""

    def hidden_of(limit: int) -> object:
        return lambda size, before: torch.full((3,), float(before if size > limit else 0))

    assert fitting_size(hidden_of(4)) == 4  # type: ignore[arg-type]
    assert fitting_size(hidden_of(0)) == 1  # type: ignore[arg-type]
