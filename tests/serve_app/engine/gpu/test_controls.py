"""Penalties, biases and min-p by the kernels give the CPU's tokens, in steps of all kinds, with one stage and two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")

from serve_app.engine.engines import TORCH
from serve_app.engine.gpu.controls import ControlTable
from serve_app.engine.gpu.engine import GpuEngine
from serve_app.engine.gpu.kernels.sampler import SamplerSpace, sample
from serve_app.engine.gpu.stage_weights import read_weights
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.engine.request_table import RequestTable
from serve_app.engine.sampler import opened_draws
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import ProtocolError
from serve_app.messages.controls import Controls
from serve_app.messages.request import MICRO, Sampling
from serve_app.messages.step import CLOSE, DRAWN_LAST, OPEN, SPAN, StepPlan
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 4
Span = tuple[int, int, int, list[int], int]  # seq, start, count, new pages, sample
ASKED = (
    Sampling(),
    Sampling(0, repetition_micro=1_300_000),
    Sampling(900_000, 40, 950_000, None, 10_000, 400_000, 300_000, 1_100_000, ((4, 3 * MICRO), (500, -MICRO))),
    Sampling(1_300_000, min_p_micro=60_000),
    Sampling(0, logit_bias=((77, 100 * MICRO),)),
    Sampling(0, presence_micro=2 * MICRO, frequency_micro=-MICRO),
)


def plan_of(
    spans: list[Span],
    opens: dict[int, tuple[Sampling, list[int], int]] | None = None,
    closes: tuple[int, ...] = (),
) -> StepPlan:
    """opens: seq -> sampling, tokens known, how many are its prompt."""
    opening = np.zeros(len(opens or {}), OPEN)
    for i, (seq, (asked, _, _)) in enumerate((opens or {}).items()):
        key = [seq % 256, 1, 2, 3, 4, 5, 6, 7]
        opening[i] = (seq, [7] * 32, key, asked.temperature_micro, asked.top_k, asked.top_p_micro, 0, 0)
    return StepPlan(
        1,
        0,
        opening,
        np.array([(seq, start, count, len(new), sample) for seq, start, count, new, sample in spans], SPAN),
        np.array([page for span in spans for page in span[3]], "<u4"),
        np.array([(seq, 0, 0) for seq in closes], CLOSE),
        np.zeros(0, "<u8"),
        Controls.of((seq, *of) for seq, of in (opens or {}).items()),
    )


def drawn(asked: list[Sampling], logits: torch.Tensor, tokens: list[int], n_prompt: int) -> list[int]:
    """By the kernels, each of a sequence that holds these tokens; pages lie backwards."""
    n, vocab = logits.shape
    per = -(-len(tokens) // PAGE)
    table = RequestTable(n, n * per, PAGE, 4096, DEVICE)
    controls = ControlTable(table, n, n * per, PAGE, (n, vocab), DEVICE)
    plan = plan_of(
        [(seq, 0, len(tokens), list(range(seq * per, (seq + 1) * per))[::-1], 1) for seq in range(n)],
        {seq: (one, tokens, n_prompt) for seq, one in enumerate(asked)},
    )
    spans = table.begin(plan)
    table.write_opened(torch.from_numpy(table.opened(plan)).to(DEVICE))
    table.write_pages(torch.from_numpy(spans.page_places).to(DEVICE), torch.from_numpy(spans.pages).to(DEVICE))
    controls.open(plan)
    controls.write_tokens(spans)
    slots, out = torch.from_numpy(spans.slots).to(DEVICE), torch.zeros(n, dtype=torch.int32, device=DEVICE)
    positions = torch.full((n,), len(tokens) - 1, dtype=torch.int32, device=DEVICE)
    controls.apply(logits, slots, positions)
    temperature, top_k, top_p = table.draws
    sample(
        logits,
        slots,
        positions,
        temperature_micro=temperature,
        top_k=top_k,
        top_p_micro=top_p,
        keys=table.keys,
        tokens=out,
        last_tokens=table.last_tokens,
        space=SamplerSpace(n, vocab, DEVICE),
        controlled=controls.controlled,
    )
    host = logits.float().cpu().numpy()
    expected = [opened_draws(plan, vocab)[seq].token(host[seq], len(tokens)) for seq in range(n)]
    assert out.tolist() == expected
    return expected


samplings = st.builds(
    Sampling,
    st.sampled_from([0, 1, 700_000, MICRO, 2 * MICRO]),
    st.sampled_from([0, 0, 1, 60]),
    st.sampled_from([MICRO, MICRO, 1, 900_000]),
    st.none(),
    st.sampled_from([0, 0, 1, 30_000, MICRO]),
    st.sampled_from([0, 700_000, -2 * MICRO]),
    st.sampled_from([0, 333_333, -MICRO]),
    st.sampled_from([MICRO, MICRO, 1_300_000, 700_001, 10 * MICRO]),
    st.dictionaries(st.integers(0, 4499), st.sampled_from([1, -100 * MICRO, 100 * MICRO, 999_999]), max_size=3).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
)


def test_each_kind_of_request_is_drawn_as_on_the_cpu() -> None:
    """The quick one of the tests below."""
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (len(ASKED), 1500)).astype(np.float32)).to(DEVICE)
    drawn(list(ASKED), logits, [3, 77, 3, 1499, 12, 12, 9, 3], 5)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.lists(samplings, min_size=3, max_size=3), st.integers(0, 1 << 30), st.sampled_from([6, 10_000]))
def test_every_control_is_drawn_as_on_the_cpu(asked: list[Sampling], seed: int, levels: int) -> None:
    """In float32 and bfloat16, with ties where there are few levels."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((rng.integers(-levels, levels, (3, 4500)) * (8 / levels)).astype(np.float32))
    tokens = [int(token) for token in rng.integers(0, 4500, 11)] * 2
    for dtype in (torch.float32, torch.bfloat16):
        drawn(asked, logits.to(DEVICE, dtype), tokens, 13)


@pytest.mark.slow
def test_long_histories_and_many_biases() -> None:
    """More tokens than are counted at a time, and as many biases as may be; ids on every block's edge."""
    logits = torch.zeros((2, 8200), device=DEVICE)
    edges = (0, 4095, 4096, 8191, 8192, 8199)
    tokens = [token for token in edges for _ in range(200)]
    asked = Sampling(0, frequency_micro=1, logit_bias=tuple((8199 - 28 * i, 1) for i in range(292, -1, -1)))
    assert drawn([asked, Sampling()], logits, tokens, 1)[0] == 8199 - 28 * 292
    for most in edges:  # an id that the answer holds once less than all others
        fewer = [token for token in tokens if token != most] + [most] * 199
        of_edges = Sampling(0, frequency_micro=1, logit_bias=tuple((edge, MICRO) for edge in edges))
        assert drawn([of_edges], logits[:1], [1, *fewer], 1) == [most]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, list[tuple[TorchEngine, GpuEngine]]]:
    """A whole model, and one in two halves: the plain engine and the GPU's of each."""
    folder, store = write_tiny_checkpoint(tmp_path_factory.mktemp("llama"), layers=2), MemoryStore()
    manifest = split(open_checkpoint(folder), store, "tiny", "float32")
    out = []
    for start, stop in ((0, 2), (0, 1), (1, 2)):
        plain = load_engine(store, manifest, start, stop, LoadOptions(DEVICE.type, "float32", PAGE, None, TORCH))  # type: ignore[arg-type]
        assert isinstance(plain, TorchEngine)
        gpu = GpuEngine(plain, read_weights(plain, PAGE), PAGE)
        for engine in (plain, gpu):
            engine.reserve(64, 8)
        out.append((plain, gpu))
    return store, out


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True], ids=["one stage", "two stages"])
def test_the_engines_draw_alike(halves: bool, stages: tuple[MemoryStore, list[tuple[TorchEngine, GpuEngine]]]) -> None:
    """Prompts in chunks, the last of one row; decode steps; one sequence ends, is opened again with all it held, and a
    plain one takes a slot that had controls. The GPU's last stage sees activations only where there are two."""
    engines = stages[1][1:] if halves else stages[1][:1]
    prompts = {10 + i: [(7 * i + 3 * j) % 30 + 3 for j in range(9)] for i in range(len(ASKED))}
    held = {seq: list(prompt) for seq, prompt in prompts.items()}
    pages = iter(range(64))

    def step(plan: StepPlan, ids: list[int]) -> list[int]:
        row = memoryview(np.array(ids, "<u4").tobytes())
        outs = [row, row]
        for plain, gpu in engines:
            results = plain.run(plan, outs[0]), gpu.run(plan, outs[1])
            outs = [result.hidden for result in results]
        assert results[0].tokens == results[1].tokens
        return list(results[0].tokens)

    def decode(seqs: list[int], **more: object) -> None:
        spans = []
        for seq in seqs:
            at = len(held[seq]) - 1
            spans.append((seq, at, 1, [next(pages)] if at % PAGE == 0 else [], 1))
        ids = [held[seq][-1] if halves else DRAWN_LAST for seq in seqs]
        for seq, token in zip(seqs, step(plan_of(spans, **more), ids), strict=True):  # type: ignore[arg-type]
            held[seq].append(token)

    opens = {seq: (ASKED[seq - 10], prompts[seq], 9) for seq in prompts}
    chunks = [(seq, 0, 8, [next(pages), next(pages)], 0) for seq in prompts]
    step(plan_of(chunks, opens), [token for prompt in prompts.values() for token in prompt[:8]])
    ends = [(seq, 8, 1, [next(pages)], 1) for seq in prompts]
    for seq, token in zip(prompts, step(plan_of(ends), [prompt[8] for prompt in prompts.values()]), strict=True):
        held[seq].append(token)
    for _ in range(3):
        decode(list(prompts))
    again = 12
    step(plan_of([], closes=(again, 13)), [])
    fresh = {again: (ASKED[2], held[again], 9), 20: (Sampling(), [5, 6], 2)}
    held[20], n = [5, 6], len(held[again])
    plan = plan_of([(again, 0, n, [next(pages) for _ in range(-(-n // PAGE))], 1), (20, 0, 2, [next(pages)], 1)], fresh)
    for seq, token in zip((again, 20), step(plan, [*held[again], 5, 6]), strict=True):
        held[seq].append(token)
    for _ in range(4):
        decode([10, 11, again, 14, 15, 20])
    assert set(held[14][9:]) == {77} and len(set(held[11][9:])) > 3
    step(plan_of([], closes=(10, 11, again, 14, 15, 20)), [])


@pytest.mark.slow
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_changes(
    stages: tuple[MemoryStore, list[tuple[TorchEngine, GpuEngine]]],
) -> None:
    gpu = stages[1][0][1]
    for asked, tokens in ((Sampling(logit_bias=((512, 1),)), [5]), (Sampling(presence_micro=1), [5, 512])):
        with pytest.raises(ProtocolError, match="token id 512"):
            gpu.run(plan_of([(90, 0, 1, [1], 1)], {90: (asked, tokens, 1)}), memoryview(np.array([5], "<u4").tobytes()))
    gpu.run(plan_of([(90, 0, 1, [1], 1)], {90: (Sampling(), [5], 1)}), memoryview(np.array([5], "<u4").tobytes()))
    gpu.run(plan_of([], closes=(90,)), memoryview(b""))
