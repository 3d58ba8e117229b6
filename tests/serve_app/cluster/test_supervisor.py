"""Which pipelines of a version end, and when: no Ray runs here, and nothing is watched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
import yaml

from serve_app.cluster.pipeline_watch import PipelineWatch
from serve_app.cluster.supervisor import _TOLD_S, _SupervisorProcess
from serve_app.config import config_path
from serve_app.errors import PipelineError, ReplacedError

ARGS = yaml.safe_load(config_path(None).read_text())["applications"][0]["args"]
THERE: Any = object()  # a pipeline that nobody calls


def supervisor(replicas: int, placed: Iterable[int]) -> _SupervisorProcess:
    """Of a version whose youngest ingress began at 10; these of its pipelines have a place."""
    made = _SupervisorProcess(ARGS, "0123456789")
    made._began, made._replicas, made._made = 10.0, replicas, made._made - 2 * _TOLD_S
    found = set(placed)
    made._watches = {i: PipelineWatch(i, made, THERE if i in found else None) for i in range(replicas)}
    return made


def ending(made: _SupervisorProcess) -> list[int]:
    return [i for i, watch in made._watches.items() if watch.retires]


def test_an_older_version_ends_one_pipeline_after_the_other_and_those_without_a_place_at_once() -> None:
    async def main() -> None:
        made = supervisor(4, placed=(0, 1, 2))
        for _ in range(3):  # each of the newer version's asks, and asks again
            await made.make_way(11.0)
            assert ending(made) == [2, 3]
        made._watches[2].group = None  # it has come to its end
        await made.make_way(11.0)
        assert ending(made) == [1, 2, 3]
        await made._match()
        assert ending(made) == [1, 2, 3], "what makes way is not made anew"

    asyncio.run(main())


def test_a_younger_version_makes_way_for_none_nor_one_that_does_not_know_how_young_it_is() -> None:
    async def main() -> None:
        made = supervisor(2, placed=(0, 1))
        await made.make_way(9.0)
        made._replicas = None
        await made.make_way(11.0)
        assert ending(made) == []

    asyncio.run(main())


def test_fewer_pipelines_end_the_last_ones_and_more_keep_them() -> None:
    async def main() -> None:
        made = supervisor(3, placed=(0, 1, 2))
        made._replicas = 1
        await made._match()
        assert ending(made) == [1, 2] and set(made._watches) == {0, 1, 2}
        made._watches[2].group = None
        await made._match()
        assert set(made._watches) == {0, 1}
        made._replicas = 2
        await made._match()
        assert ending(made) == []

    asyncio.run(main())


def test_nobody_waits_for_a_pipeline_that_is_not_to_be_and_everybody_for_one_that_starts() -> None:
    async def main() -> None:
        made = supervisor(2, placed=())
        with pytest.raises(PipelineError, match="starting") as starting:
            await made.head_address(1)
        assert not isinstance(starting.value, ReplacedError)
        with pytest.raises(ReplacedError, match="there are 2 pipelines now"):
            await made.head_address(2)
        made._watches[1].retire("it makes room", at_once=True)
        with pytest.raises(ReplacedError, match="it makes room"):
            await made.head_address(1)
        made._replicas = None  # a Supervisor that was restarted, and knows of no ingress yet
        with pytest.raises(PipelineError) as unknown:
            await made.head_address(5)
        assert not isinstance(unknown.value, ReplacedError)

    asyncio.run(main())


def test_other_pipelines_of_a_version_are_no_newer_version() -> None:
    """The one that ends while nothing runs on it leaves the others as they are."""

    async def main() -> None:
        made = supervisor(2, placed=(0,))
        made._watches[1].retire("it has no place", at_once=True)
        assert made._watches[1].is_over and not made._watches[0].retires
        made._watches[1].stay()
        assert not made._watches[1].is_over

    asyncio.run(main())
