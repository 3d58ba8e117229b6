"""The client's side of a connection: its body with a bound, and the moment it hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve_app.errors import BodyTooLargeError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up; nobody is left to tell."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body. Raises BodyTooLargeError as soon as more than max_bytes are announced or have come, ClientGoneError."""
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise BodyTooLargeError(max_bytes)
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                raise BodyTooLargeError(max_bytes)
    except ClientDisconnect as e:
        raise ClientGoneError from e
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; it is cancelled, and ClientGoneError raised, when the client hangs up first.

    The body must have been read: what comes on `receive` after it is the hang-up. Watching here, rather than waiting
    for a failed write, also notices a client that leaves while its request waits for a place.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
            raise ClientGoneError  # also when `work` failed in the same moment: writing to nobody is what failed
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait({working, watching})
        for task in (working, watching):
            if not task.cancelled():
                task.exception()  # seen: asyncio would log one that nobody asked for


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
