"""Frames over a TCP connection between two processes that share a secret.

Both sides prove that they know the secret before a frame is read (HMAC-SHA256 over both sides' nonces), so a
stranger on the network can neither ask nor answer. Frames are neither encrypted nor signed one by one: a link
stays inside one trust domain (DESIGN 2.9); between domains goes mutual TLS. Knows nothing of what frames say.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import struct
from dataclasses import dataclass

from serve_app.errors import PipelineError, ProtocolError

SECRET_BYTES = 32
_LENGTH = struct.Struct("<I")
_HELLO = b"llmd-link-1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HANDSHAKE_S = 5.0  # a peer that says nothing for so long is none of ours
_MAX_UNSENT_BYTES = 64 << 20  # towards a peer that does not read; then it is cut off


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a process listens, and the secret that opens it."""

    host: str
    port: int
    secret: bytes


class Link:
    """One authenticated connection. `send` from anywhere in the loop; `receive` from one task."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_frame_bytes: int) -> None:
        self._reader, self._writer, self._max = reader, writer, max_frame_bytes

    def send(self, frame: bytes) -> None:
        """Queue a frame, in order. A peer that has stopped reading is cut off instead of filling memory."""
        transport = self._writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            transport.abort()
            return
        self._writer.write(_LENGTH.pack(len(frame)) + frame)

    async def receive(self) -> bytes | None:
        """The next frame, or None when the peer is gone. Raises ProtocolError for one past the bound."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > self._max:
                raise ProtocolError(f"a frame of {length} bytes where at most {self._max} are accepted")
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError, OSError):
            return None

    def close(self) -> None:
        """Cut the connection; the peer sees its end."""
        self._writer.transport.abort()


async def connect(address: LinkAddress, max_frame_bytes: int, timeout_s: float = _HANDSHAKE_S) -> Link:
    """A link to a listener that knows the secret. Raises PipelineError if none answers in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                mine = secrets.token_bytes(_NONCE_BYTES)
                writer.write(_HELLO + mine)
                answer = await reader.readexactly(_NONCE_BYTES + _PROOF_BYTES)
                theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
                if not hmac.compare_digest(proof, _proof(address.secret, b"listener", mine, theirs)):
                    raise ProtocolError("the listener does not know the secret")
                writer.write(_proof(address.secret, b"caller", mine, theirs))
            except BaseException:
                writer.transport.abort()
                raise
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ProtocolError) as e:
        raise PipelineError(
            f"no pipeline head answers at {address.host}:{address.port}: {e or type(e).__name__}"
        ) from e
    return Link(reader, writer, max_frame_bytes)


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, max_frame_bytes: int
) -> Link | None:
    """The link of a caller that knows the secret, or None: then it was cut off."""
    try:
        async with asyncio.timeout(_HANDSHAKE_S):
            hello = await reader.readexactly(len(_HELLO) + _NONCE_BYTES)
            theirs, mine = hello[len(_HELLO) :], secrets.token_bytes(_NONCE_BYTES)
            if hello.startswith(_HELLO):
                writer.write(mine + _proof(secret, b"listener", theirs, mine))
                proof = await reader.readexactly(_PROOF_BYTES)
                if hmac.compare_digest(proof, _proof(secret, b"caller", theirs, mine)):
                    return Link(reader, writer, max_frame_bytes)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        pass
    writer.transport.abort()
    return None


def _proof(secret: bytes, role: bytes, caller_nonce: bytes, listener_nonce: bytes) -> bytes:
    return hmac.digest(secret, b"%b\0%b%b" % (role, caller_nonce, listener_nonce), "sha256")
