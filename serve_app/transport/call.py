"""One question and its answer between two nodes that know each other's key, on a TLS connection of its own.

A connection each, because then a link that was cut leaves nothing to mend: the next question finds its own way. What
is said is not looked into here; whoever answers knows which node asks. Layout: PROTOCOL.md, "A stage of another
operator".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from serve_app.errors import PipelineError, ProtocolError
from serve_app.transport.handshake import HANDSHAKE_S
from serve_app.transport.tcp import reason
from serve_app.transport.tls import peer_of, tls_context
from shard_tools.signing import PublicKey, key_text

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 10  # the longest, to await the edges of 64 neighbours, has 12 KiB
_MAX_STRANGERS = 32  # connections that have not proved themselves; the next one takes the place of an old one
_MAX_ASKING = 16  # of nodes that may ask; one controller has two open, as a rule
# A connection over which an answer is awaited for long, while nothing is sent: the kernel asks whether the host lives.
_SILENT_S, _PROBES = 2, 3
_DEAD_MS = 8_000

Answer = Callable[[PublicKey, bytes], Awaitable[bytes]]


async def ask(
    host: str, port: int, key: PublicKey, credentials: bytes, question: bytes, longest: int = MAX_FRAME_BYTES
) -> bytes:
    """What the node of this key answers. Waits for as long as its host lives.

    credentials: as tls_context takes them. longest: bytes of the answer. Raises PipelineError if it cannot be
    reached, is another node, does not expect this one, or says nothing that is an answer.
    """
    where = f"{host}:{port}"
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            reader, writer = await asyncio.open_connection(
                host, port, ssl=tls_context(credentials, frozenset((key,)), listens=False)
            )
    except ssl.SSLError as e:
        raise PipelineError(f"{where} is not the node {key_text(key)}: {reason(e)}") from e
    except (OSError, TimeoutError) as e:
        raise PipelineError(f"{where} cannot be reached: {_why(e)}") from e
    try:
        _keep_alive(writer.get_extra_info("socket"))
        peer_of(writer.get_extra_info("ssl_object"), frozenset((key,)))
        writer.write(_LENGTH.pack(len(question)) + question)
        return await _read(reader, longest)
    except ssl.SSLError as e:
        raise PipelineError(f"{where} takes no orders from this node: {reason(e)}") from e
    except (OSError, asyncio.IncompleteReadError) as e:
        raise PipelineError(
            f"{where} ended the connection without an answer ({_why(e)}): it died, or takes no orders from this node"
        ) from e
    except ProtocolError as e:
        raise PipelineError(f"{where} gave no answer of ours: {e}") from e
    finally:
        writer.transport.abort()


class CallListener:
    """Answers the questions of some nodes; everybody else is cut off in the handshake."""

    def __init__(self, credentials: Callable[[], bytes], peers: frozenset[PublicKey], answer: Answer) -> None:
        """credentials: made for each connection, as tls_context takes them. answer: raises nothing; it is cancelled if

        the caller leaves.
        """
        self._credentials, self._peers, self._answer = credentials, peers, answer
        self._strangers: dict[asyncio.Task[None], str] = {}  # oldest first: from which host
        self._asking: set[asyncio.Task[None]] = set()

    async def serve(self, door: socket.socket) -> None:
        """Let callers in, until this is cancelled. door: listens."""
        door.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(door)
                except OSError as e:  # out of files, or the caller has left: not the end of listening
                    _log.warning("a connection could not be taken: %s", reason(e))
                    await asyncio.sleep(0.1)
                    continue
                if len(self._strangers) >= _MAX_STRANGERS:
                    self._cut_one()
                task = loop.create_task(self._converse(connection))
                self._strangers[task] = address[0]
                task.add_done_callback(self._forget)
        finally:
            for task in [*self._strangers, *self._asking]:
                task.cancel()
            door.close()

    async def _converse(self, connection: socket.socket) -> None:
        """One question, one answer; then the caller ends the connection, lest the answer be lost."""
        transport: asyncio.BaseTransport | None = None
        waiting: list[asyncio.Future[bytes]] = []
        try:
            _keep_alive(connection)
            async with asyncio.timeout(HANDSHAKE_S):
                reader, transport, writer, who = await self._let_in(connection)
                question = await _read(reader)
            self._promote()
            answering, leaving = (
                asyncio.ensure_future(self._answer(who, question)),
                asyncio.ensure_future(reader.read(1)),
            )
            waiting = [answering, leaving]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():  # else nobody waits for the answer any more
                answer = answering.result()
                writer.write(_LENGTH.pack(len(answer)) + answer)
                await asyncio.wait((leaving,), timeout=HANDSHAKE_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, PipelineError, ProtocolError) as e:
            _log.warning("a caller was refused or lost: %s", _why(e))
        finally:
            await _end(waiting)
            if transport is not None:
                transport.abort()  # type: ignore[attr-defined]
            connection.close()

    async def _let_in(
        self, connection: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.BaseTransport, asyncio.StreamWriter, PublicKey]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_FRAME_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        context = tls_context(self._credentials(), self._peers, listens=True)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=context, ssl_handshake_timeout=HANDSHAKE_S
        )
        try:
            who = peer_of(transport.get_extra_info("ssl_object"), self._peers)
        except BaseException:
            transport.abort()
            raise
        return reader, transport, asyncio.StreamWriter(transport, protocol, reader, loop), who

    def _promote(self) -> None:
        """The caller has shown who it is, and asked."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._asking) >= _MAX_ASKING:
            raise PipelineError(f"{_MAX_ASKING} questions are being answered already")
        self._strangers.pop(task, None)
        self._asking.add(task)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        self._asking.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a question could not be answered", exc_info=task.exception())

    def _cut_one(self) -> None:
        """As EdgeListener does: the oldest of the host that has most."""
        most = Counter(self._strangers.values()).most_common(1)[0][0]
        oldest = next(task for task, host in self._strangers.items() if host == most)
        del self._strangers[oldest]
        oldest.cancel()


async def _end(waiting: list[asyncio.Future[bytes]]) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _read(reader: asyncio.StreamReader, longest: int = MAX_FRAME_BYTES) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > longest:
        raise ProtocolError(f"a frame of {length} bytes where at most {longest} are accepted")
    return await reader.readexactly(length)


def _keep_alive(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be gone already, and whoever reads will see that
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not error.args:
        return f"no answer within {HANDSHAKE_S:.0f} s"
    if isinstance(error, asyncio.IncompleteReadError):
        return "it was closed"
    return reason(error) if isinstance(error, OSError) else str(error)
