"""Memory runs out in one part of the work: whoever waits for it is told, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.load import LoadOptions
from serve_app.errors import PipelineError
from serve_app.local import LocalPipeline
from serve_app.messages.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    RequestId,
    Sampling,
    fresh_salt,
)
from serve_app.messages.step import StepPlan
from serve_app.pipeline import witness
from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.fetch import fetch
from shard_tools.manifest import Manifest
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from shard_tools.store.tiered import TieredStore

Tiny = tuple[MemoryStore, Manifest]
ENDS_S = 30.0  # milliseconds alone; a step that nobody tells of would take the Head a minute to miss


def once(work: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The same, but for its call number `at`, for which there is no memory."""
    calls = [0]

    def short(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise MemoryError("none is left")
        return work(*args, **named)

    return short


def ends(tiny: Tiny) -> list[Event]:
    """How two requests end that run when it happens, and one after them if it is taken in."""
    store, manifest = tiny

    async def main() -> list[Event]:
        pipeline = LocalPipeline(store, manifest, stages=2, options=LoadOptions("cpu", "float32", 16, 1))

        async def ask(name: str) -> Event:
            asked = GenerationRequest(
                RequestId(name), manifest.cid, tuple(range(3, 20)), 12, Sampling(0), (), b"", fresh_salt()
            )
            return [event async for event in pipeline.generate(asked)][-1]

        try:
            found = list(await asyncio.gather(ask("a"), ask("b")))
            try:
                found.append(await ask("c"))
            except PipelineError as e:
                assert "is being rebuilt" in str(e)
            return found
        finally:
            pipeline.close()

    return asyncio.run(asyncio.wait_for(main(), ENDS_S))


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_no_memory_to_hash_rows_ends_requests_with_an_error_and_never_with_a_receipt(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(witness, "leaves_of", once(witness.leaves_of, at))
    first, *_ = found = ends(tiny)
    failed = [event for event in found if isinstance(event, FailedEvent)]
    assert failed and all("none is left" in event.message for event in failed), found
    assert isinstance(first, FailedEvent | FinishedEvent)


@pytest.mark.parametrize("at", [1, 2, 7])
def test_no_memory_for_a_message_that_came_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(StepPlan, "decode", once(StepPlan.decode, at))
    failed = [event for event in ends(tiny) if isinstance(event, FailedEvent)]
    assert failed and "a message was lost: none is left" in failed[0].message


class Short:
    """A source that has no memory for one of its blocks."""

    label = "a short one"

    def __init__(self, inner: MemoryStore, at: int) -> None:
        self.get: Callable[[Cid], bytes] = once(inner.get, at)


@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_fetch_without_memory_ends_and_may_be_begun_again(tiny: Tiny, tmp_path: Path, at: int) -> None:
    """No lock is left, and what had come is whole."""
    store, manifest = tiny
    source = Short(store, at)
    tiered = TieredStore(DirectoryStore(tmp_path / "near"), tmp_path / "lock", lambda _: [source])
    target = DirectoryStore(tmp_path / "target")
    with pytest.raises((MemoryError, LlmdError)):
        fetch(tiered, target, manifest.cid)
    assert fetch(tiered, target, manifest.cid) == manifest
