"""Two stages at the ends of a slow link: the same answer, and nobody is taken for dead."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from benchmarks.models import PublishedModel, published
from benchmarks.slow_link import answers, far_apart

pytestmark = [pytest.mark.slow]

TOKENS, JITTER = 12, 0.25
TRIES = 3  # a machine that stands still for half a second is no slow link


async def lost_over(model: PublishedModel, delay_s: float) -> list[tuple[str, str]]:
    """Whom the ends took for dead, over two answers and two idle seconds between them."""
    losses: list[tuple[str, str]] = []
    pipeline = model.pipeline(2)
    try:
        expected = await answers(pipeline, model.manifest, 1, TOKENS)
        with far_apart(pipeline, delay_s, JITTER, lambda peer, why: losses.append((peer, why))):
            for idle_s in (2.0, 0.0):  # twice as long as it takes to find a dead one
                began = time.monotonic()
                assert await answers(pipeline, model.manifest, 1, TOKENS) == expected
                assert time.monotonic() - began > TOKENS * delay_s * (1 - JITTER)  # it went that way
                await asyncio.sleep(idle_s)
            return list(losses)
    except RuntimeError:
        assert losses, "a request failed, and no edge was lost"
        return losses
    finally:
        pipeline.close()


@pytest.mark.parametrize("delay_s", [0.05, 0.2])
def test_an_answer_over_a_slow_and_uneven_link_is_that_without_one(tmp_path: Path, delay_s: float) -> None:
    """Rows wait; heartbeats, which wait with them, come late and keep coming."""
    model = published(tmp_path, "tiny")
    lost: list[tuple[str, str]] = []
    for _ in range(TRIES):
        lost = asyncio.run(lost_over(model, delay_s))
        if not lost:
            break
    assert lost == []
