"""The laws of Engine, over every engine that can be named here: ours, and those of installed packages.

Run from outside: give the fixture `kind` (the Choice of an engine) and import the rest; see tests/contracts/README.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from serve_app.engine.engine import Engine, StepOutput
from serve_app.engine.engines import ENGINES, TORCH
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.errors import ConfigError, ProtocolError
from serve_app.messages.controls import Controls
from serve_app.messages.request import Sampling
from serve_app.messages.step import DRAW_EACH, DRAW_NEXT, DRAWN_LAST
from serve_app.receipts.rows import Boundary, ids_boundary, leaves_of
from shard_tools.choice import Choice
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.engine_steps import (
    GREEDY,
    MAX_SEQUENCES,
    N_PAGES,
    OPEN_SEVEN,
    PAGE,
    REFUSED,
    STEPS,
    VOCAB,
    Step,
    ids,
    numpy_is_even,
    plan_of,
    published,
)

# Triton's interpreter takes ten seconds for what a GPU does in microseconds.
KINDS = [
    TORCH,
    Choice("cpu"),
    pytest.param(Choice("gpu"), marks=pytest.mark.slow),
    *(Choice(name) for name in ENGINES.outside_names()),
]


@pytest.fixture(params=KINDS, ids=lambda choice: choice.kind)
def kind(request: pytest.FixtureRequest) -> Choice:
    """Which engine."""
    choice: Choice = request.param
    if choice.kind == "gpu":
        pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'llm-d[test]'")
    return choice


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, Manifest]:
    """A tiny model, the same for all engines."""
    return published(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Subject:
    """Fresh engines of one kind on one model."""

    kind: Choice
    store: MemoryStore
    manifest: Manifest

    def engine(self, start: int = 0, stop: int = 2, kind: Choice | None = None, deterministic: bool = False) -> Engine:
        """Layers [start, stop), ready for steps."""
        options = LoadOptions("cpu", "float32", PAGE, None, kind or self.kind, deterministic)
        engine = load_engine(self.store, self.manifest, start, stop, options)
        engine.reserve(N_PAGES, MAX_SEQUENCES)
        return engine


@pytest.fixture
def subject(kind: Choice, model: tuple[MemoryStore, Manifest]) -> Subject:
    return Subject(kind, *model)


def run(engine: Engine, step: Step) -> StepOutput:
    return engine.launch(*step).result()


def floats(rows: memoryview) -> npt.NDArray[np.float32]:
    return np.frombuffer(rows, "<f4")


def close(found: memoryview, wanted: memoryview) -> None:
    expected = floats(wanted)
    np.testing.assert_allclose(
        floats(found), expected, rtol=1e-3, atol=1e-4 * max(float(np.abs(expected).max(initial=0)), 1.0)
    )


def row(output: StepOutput, i: int, width: int) -> memoryview:
    """Hidden row i."""
    return output.hidden[i * width * 4 : (i + 1) * width * 4]


def test_it_gives_what_the_plain_engine_gives_and_its_profile_stays(subject: Subject) -> None:
    """Tokens, and the ids they came from, are equal; rows within rounding of float32."""
    plain, engine = subject.engine(kind=TORCH), subject.engine()
    before = engine.profile
    assert (before.dtype, before.hidden_size) == ("float32", subject.manifest.hidden_size)
    assert len(before.description) > 0 and before.parameter_bytes > 0 and before.kv_page_bytes > 0
    for step in STEPS:
        wanted, found = run(plain, step), run(engine, step)
        assert found.tokens == wanted.tokens
        assert bytes(found.received) == bytes(wanted.received)
        close(found.hidden, wanted.hidden)
    assert engine.profile == before


def test_steps_take_effect_in_the_order_of_launching_however_results_are_waited_for(subject: Subject) -> None:
    """DRAWN_LAST means the token of the step before, though nobody has waited for that step."""
    one, other = subject.engine(), subject.engine()
    steps = STEPS[:4]
    waited = [run(one, step) for step in steps]
    flights = [other.launch(*step) for step in steps]
    for flight, wanted in reversed(list(zip(flights, waited, strict=True))):
        found = flight.result()
        assert found.tokens == wanted.tokens and bytes(found.received) == bytes(wanted.received)
        close(found.hidden, wanted.hidden)
    last = int(np.frombuffer(waited[3].received, "<u4")[0])
    assert last == waited[2].tokens[1]  # sequence 1's


def test_a_token_drawn_last_is_as_good_as_its_id(subject: Subject) -> None:
    told, untold = subject.engine(), subject.engine()
    begin = (plan_of([(1, 0, 3, [2], 1)], {1: (900_000, 0, 10**6)}), ids(4, 5, 6))
    (token,) = run(told, begin).tokens
    assert run(untold, begin).tokens == (token,)
    plan = plan_of([(1, 3, 1, [], 1)])
    a, b = run(told, (plan, ids(token))), run(untold, (plan, ids(DRAWN_LAST)))
    assert a.tokens == b.tokens and bytes(a.received) == bytes(b.received) == bytes(ids(token))
    close(a.hidden, b.hidden)


def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(subject: Subject) -> None:
    """After all of them the sequence goes on as if nothing had been asked."""
    engine, undisturbed = subject.engine(), subject.engine()
    assert run(engine, OPEN_SEVEN).tokens == run(undisturbed, OPEN_SEVEN).tokens
    for why, step in REFUSED.items():
        with pytest.raises(ProtocolError):
            engine.launch(*step)
            pytest.fail(f"taken: {why}")
    after = (plan_of([(7, 3, 1, [], 1)]), ids(4))
    found, wanted = run(engine, after), run(undisturbed, after)
    assert found.tokens == wanted.tokens
    close(found.hidden, wanted.hidden)


@pytest.mark.parametrize("draw", [GREEDY, (900_000, 40, 950_000)])
def test_right_guesses_give_the_tokens_that_come_one_by_one_and_wrong_ones_leave_no_trace(
    subject: Subject, draw: tuple[int, int, int]
) -> None:
    """Beside a prompt and a row, and across pages; then the sequence goes on where the first wrong guess stood."""
    plain, guessing, width = subject.engine(), subject.engine(), subject.manifest.hidden_size
    begin = (plan_of([(1, 0, 5, [3, 9], DRAW_NEXT)], {1: draw}), ids(*range(5, 10)))
    told, rows = [*run(plain, begin).tokens], []
    for position in range(5, 12):
        out = run(plain, (plan_of([(1, position, 1, [4] if position == 8 else [], 1)]), ids(told[-1])))
        told += out.tokens
        rows.append(out.hidden)
    wrong = [(token + 1) % VOCAB for token in told]
    assert list(run(guessing, begin).tokens) == told[:1]
    # Two right guesses and two wrong ones, of which the last begins a page.
    step = plan_of([(2, 0, 3, [0], 1), (1, 5, 5, [4], DRAW_EACH)], {2: GREEDY})
    first = run(guessing, (step, ids(1, 2, 3, *told[:3], *wrong[3:5])))
    assert len(first.tokens) == 6 and list(first.tokens[1:4]) == told[1:4]
    # Only right ones, beside a row of another.
    second = run(guessing, (plan_of([(1, 8, 3, [], DRAW_EACH), (2, 3, 1, [], 1)]), ids(*told[3:6], first.tokens[0])))
    assert list(second.tokens[:3]) == told[4:7]
    third = run(guessing, (plan_of([(1, 11, 1, [], 1)]), ids(told[6])))
    assert list(third.tokens) == told[7:8]
    for wanted, out, i in zip(rows, [*[first] * 3, *[second] * 3, third], (3, 4, 5, 0, 1, 2, 0), strict=True):
        close(row(out, i, width), wanted)


def test_only_guesses_are_taken_back_and_nobody_knows_what_was_drawn_last_behind_them(subject: Subject) -> None:
    engine, undisturbed = subject.engine(), subject.engine()
    penalised = plan_of([(2, 0, 2, [5], 1)], {2: GREEDY})
    controls = Controls.of([(2, Sampling(0, presence_micro=1), [1, 2], 2)])
    for each in (engine, undisturbed):
        run(each, OPEN_SEVEN)
        run(each, (dataclasses.replace(penalised, controls=controls), ids(1, 2)))
        run(each, (plan_of([(7, 3, 4, [1], DRAW_EACH)]), ids(4, 5, 6, 7)))
    for why, step in {
        "before the first row": (plan_of([(7, 3, 1, [], 1)]), ids(4)),
        "with a gap": (plan_of([(7, 8, 1, [2], 1)]), ids(4)),
        "drawn last": (plan_of([(7, 5, 1, [], 1)]), ids(DRAWN_LAST)),
        "penalised": (plan_of([(2, 2, 2, [], DRAW_EACH)]), ids(3, 4)),
    }.items():
        with pytest.raises(ProtocolError):
            engine.launch(*step)
            pytest.fail(f"taken: {why}")
    after = (plan_of([(7, 5, 2, [], 1), (2, 2, 1, [], 1)]), ids(8, 9, DRAWN_LAST))
    found, wanted = run(engine, after), run(undisturbed, after)
    assert found.tokens == wanted.tokens
    close(found.hidden, wanted.hidden)
    with pytest.raises(ProtocolError):
        engine.launch(plan_of([(7, 6, 1, [], 1)]), ids(9))  # these were no guesses
    assert len(run(engine, (plan_of([(7, 7, 1, [], 1)]), ids(DRAWN_LAST))).tokens) == 1


def test_a_sequence_does_not_feel_its_batch_mates_or_its_chunks(subject: Subject) -> None:
    """Alone and at once, or in two chunks among others: the same rows within rounding, the same seeded tokens."""
    width, draw = subject.manifest.hidden_size, (700_000, 30, 950_000)
    alone, among = subject.engine(), subject.engine()
    whole = run(alone, (plan_of([(5, 0, 6, [0, 1], 1)], {5: draw}), ids(*range(40, 46))))
    mate = plan_of([(6, 0, 3, [9], 1), (5, 0, 4, [7], 0)], {6: GREEDY, 5: draw})
    first = run(among, (mate, ids(1, 2, 3, *range(40, 44))))
    second = run(among, (plan_of([(5, 4, 2, [3], 1), (6, 3, 1, [], 1)]), ids(44, 45, DRAWN_LAST)))
    for i in range(4):
        close(row(first, 3 + i, width), row(whole, i, width))
    for i in range(2):
        close(row(second, i, width), row(whole, 4 + i, width))
    assert second.tokens[0] == whole.tokens[0]
    assert all(0 <= token < VOCAB for out in (whole, first, second) for token in out.tokens)


def test_an_engine_that_is_loaded_as_deterministic_gives_the_same_bits_in_any_company(subject: Subject) -> None:
    """Whole and alone, in chunks behind another prompt, as a decode row. An engine that cannot must refuse to load."""
    if subject.kind.kind == "gpu" and not torch.cuda.is_available() and not numpy_is_even():
        pytest.skip("its kernels are interpreted here by a numpy whose bits depend on a row's place")
    try:
        alone, among = subject.engine(deterministic=True), subject.engine(deterministic=True)
    except ConfigError:
        return
    whole = run(alone, (plan_of([(5, 0, 6, [0, 1], 1)], {5: GREEDY}), ids(*range(40, 46))))
    width, rows = subject.manifest.hidden_size, b""
    for step, first, n in (
        ((plan_of([(6, 0, 3, [9], 1), (5, 0, 4, [7], 0)], {6: GREEDY, 5: GREEDY}), ids(1, 2, 3, *range(40, 44))), 3, 4),
        ((plan_of([(5, 4, 1, [3], 1), (6, 3, 1, [], 1)]), ids(44, 7)), 0, 1),
        ((plan_of([(6, 4, 2, [4], 1), (5, 5, 1, [], 1)]), ids(8, 9, 45)), 2, 1),
    ):
        last = run(among, step)
        rows += b"".join(bytes(row(last, i, width)) for i in range(first, first + n))
    assert rows == bytes(whole.hidden) and last.tokens[-1] == whole.tokens[0]


def test_a_close_forgets(subject: Subject) -> None:
    """The number and the pages may be used again, and nothing of the old sequence is seen through them."""
    used, fresh = subject.engine(), subject.engine()
    run(used, (plan_of([(7, 0, 6, [0, 1], 1)], {7: GREEDY}, closes=(7,)), ids(*range(90, 96))))
    with pytest.raises(ProtocolError):
        used.launch(plan_of([(7, 6, 1, [], 1)]), ids(5))
    run(used, (plan_of([], closes=(7, 99)), ids()))  # closed before, or never open: nothing happens
    again = (plan_of([(7, 0, 3, [1], 1)], {7: GREEDY}), ids(1, 2, 3))
    found, wanted = run(used, again), run(fresh, again)
    assert found.tokens == wanted.tokens
    close(found.hidden, wanted.hidden)


def test_two_ranges_make_the_whole(subject: Subject) -> None:
    """Rows that leave one engine enter the next; only the one with the head draws."""
    whole, first, second = subject.engine(), subject.engine(0, 1), subject.engine(1, 2)
    steps = [STEPS[0], (plan_of([(1, 5, 1, [], 1), (2, 9, 2, [], 1)]), ids(11, 30, 31))]
    for plan, rows in steps:
        wanted = run(whole, (plan, rows))
        between = run(first, (plan, rows))
        assert between.tokens == ()
        found = run(second, (plan, between.hidden))
        assert found.tokens == wanted.tokens and bytes(found.received) == bytes(between.hidden)
        close(found.hidden, wanted.hidden)
    with pytest.raises(ProtocolError):
        second.launch(plan_of([(1, 6, 1, [], 1)]), ids(DRAWN_LAST))  # ids are no rows


@pytest.mark.parametrize("hand_on", [True, False])
def test_hashes_are_of_the_rows_and_whoever_makes_none_says_so(subject: Subject, hand_on: bool) -> None:
    engine, manifest = subject.engine(), subject.manifest
    inlet, outlet = ids_boundary(manifest.cid), Boundary(manifest.cid, 2, "float32", manifest.hidden_size)
    agreed = engine.hash_rows(inlet.leaf_prefix, outlet.leaf_prefix, hand_on=hand_on)
    found = run(engine, OPEN_SEVEN)
    if not agreed:
        assert found.digests is None and len(found.hidden) == 3 * manifest.hidden_size * 4
        return
    assert found.digests is not None
    came, left = found.digests.wait()
    assert bytes(came) == leaves_of(inlet, [(0, 3)], found.received)
    wanted = run(subject.engine(), OPEN_SEVEN).hidden  # of an engine that hands its rows on
    assert bytes(left) == leaves_of(outlet, [(0, 3)], found.hidden if hand_on else wanted)
