"""Whom an auditor asks for rows: an actor of the cluster, or a stage of another operator over TLS.

`hold` and `release` are said and not waited for; `show` is waited for, and bounded in time by whoever calls.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from serve_app.audit.showing import PIECE_BYTES
from serve_app.cluster.outside import OutsideStage
from serve_app.cluster.row_orders import PIECE_BYTES as OUTSIDE_PIECE_BYTES
from serve_app.cluster.row_orders import HoldRows, ReleaseRows
from shard_tools.errors import LlmdError

_log = logging.getLogger(__name__)
_SAY_S = 10.0
_SHOW_S = 15.0  # below what an auditor gives a piece: silence is answered for, see OutsideRows.show
_AT_ONCE = 4  # of what is said to one stage, which hears sixteen callers
_MAX_SAID = 1024  # that wait to be said


class RowHolder(Protocol):
    """One stage that keeps rows."""

    @property
    def piece_bytes(self) -> int:
        """How long a piece is that is not the last."""

    def hold(self, request: bytes, attempt: int, promised: bool) -> None: ...

    async def show(self, request: bytes, attempt: int, start: int) -> bytes | None:
        """A piece from `start` on; None if it shows none."""

    def release(self, request: bytes, attempt: int, promised: bool) -> None: ...


class RayRows:
    """Of an actor. `show` raises RayError where it is gone."""

    piece_bytes = PIECE_BYTES

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def hold(self, request: bytes, attempt: int, promised: bool) -> None:
        self._actor.hold.remote(request, attempt, promised)

    async def show(self, request: bytes, attempt: int, start: int) -> Any:
        return await self._actor.show.remote(request, attempt, start)

    def release(self, request: bytes, attempt: int, promised: bool) -> None:
        self._actor.release.remote(request, attempt, promised)


class OutsideRows:
    """Of a stage of another operator. Made once for each, and used in one event loop."""

    piece_bytes = OUTSIDE_PIECE_BYTES

    def __init__(self, stage: OutsideStage) -> None:
        self._stage = stage
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._said: set[asyncio.Task[None]] = set()

    def hold(self, request: bytes, attempt: int, promised: bool) -> None:
        self._say(HoldRows(request, attempt, promised))

    async def show(self, request: bytes, attempt: int, start: int) -> bytes | None:
        """Refusal and silence are the same: it showed none. Else who fears an audit need only not answer."""
        try:
            async with asyncio.timeout(_SHOW_S):
                return await self._stage.show_rows(request, attempt, start)
        except (LlmdError, TimeoutError) as e:
            _log.warning("rows are not shown: %s", str(e) or f"no answer within {_SHOW_S:.0f} s")
            return None

    def release(self, request: bytes, attempt: int, promised: bool) -> None:
        self._say(ReleaseRows(request, attempt, promised))

    def _say(self, order: HoldRows | ReleaseRows) -> None:
        if len(self._said) < _MAX_SAID:  # else it does not answer, and will not show either
            task = asyncio.get_running_loop().create_task(self._said_in_turn(order))
            self._said.add(task)
            task.add_done_callback(self._said.discard)

    async def _said_in_turn(self, order: HoldRows | ReleaseRows) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(_SAY_S):
                    await self._stage.tell_rows(order)
            except (LlmdError, TimeoutError) as e:
                _log.warning("it could not be told of rows: %s", str(e) or "no answer")
