"""Who may open which edge, and the first bytes both sides exchange. Layout: PROTOCOL.md, "Edges".

Whoever makes a pipeline tells each process which neighbours to expect, under which node keys and process ids; nothing
else is let in. An edge is named ("stage 0 > stage 1"), so that one process tells its edges apart, and it belongs to one
epoch: a process of a pipeline that was finds no way into the one that is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from serve_app.errors import PipelineError, ProtocolError
from serve_app.messages.step import MAX_PAYLOAD_BYTES
from serve_app.transport.edge import Deliver, Lost
from shard_tools.signing import PublicKey

EdgeKind = Literal["shared_memory", "tcp"]

HANDSHAKE_S = 5.0  # a peer that says nothing for so long is none of ours
MAX_ANSWER_BYTES = 257
_MAGIC = b"llmd-edge-1\n"
_HELLO = struct.Struct("<12sQIB")  # magic, epoch, bytes of the ring or 0, length of the name that follows
HELLO_BYTES = _HELLO.size
_MAX_NAME_BYTES = 100
_ACCEPTED, _REFUSED = 1, 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A process at the other end of an edge."""

    name: str  # for people: "stage 1"
    key: PublicKey  # its node's, out of the registry
    pid: int  # on its host


@dataclass(frozen=True, slots=True)
class EdgeAddress:
    """Where a process awaits its neighbours; None where it awaits none by that way."""

    path: str | None  # of a Unix socket
    host: str
    port: int | None


@dataclass(frozen=True, slots=True)
class Inlet:
    """An edge that a process awaits, and what is done with its messages and its end."""

    edge: str
    kind: EdgeKind
    peer: Peer
    deliver: Deliver
    lost: Lost
    max_bytes: int = MAX_PAYLOAD_BYTES  # of one message; a peer that announces more is cut off


@dataclass(frozen=True, slots=True)
class Outlet:
    """An edge that a process opens."""

    edge: str
    kind: EdgeKind
    peer: Peer
    address: EdgeAddress


@dataclass(frozen=True, slots=True)
class Hello:
    """What the side that opens an edge says first. Law: decode(encode(h)) == h."""

    epoch: int
    edge: str
    ring_bytes: int = 0

    def encode(self) -> bytes:
        """The bytes."""
        name = self.edge.encode()
        return _HELLO.pack(_MAGIC, self.epoch, self.ring_bytes, len(name)) + name

    @staticmethod
    def name_bytes(head: bytes) -> int:
        """How many bytes follow these first HELLO_BYTES. Raises ProtocolError."""
        if len(head) != HELLO_BYTES or not head.startswith(_MAGIC):
            raise ProtocolError("no edge of this version begins like that")
        length = int(_HELLO.unpack(head)[3])
        if length > _MAX_NAME_BYTES:
            raise ProtocolError(f"an edge's name of {length} bytes, where {_MAX_NAME_BYTES} are accepted")
        return length

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Read encode's bytes. Raises ProtocolError."""
        head, name = data[:HELLO_BYTES], data[HELLO_BYTES:]
        if len(name) != cls.name_bytes(head):
            raise ProtocolError("an edge's first message was cut short")
        _, epoch, ring_bytes, _ = _HELLO.unpack(head)
        try:
            return cls(epoch, name.decode(), ring_bytes)
        except UnicodeDecodeError as e:
            raise ProtocolError("an edge's name is not UTF-8") from e

    def require_epoch(self, epoch: int) -> None:
        """Raises ProtocolError if this is the hello of another epoch."""
        if self.epoch != epoch:
            raise ProtocolError(f"this is epoch {epoch} of the pipeline, and the edge is of epoch {self.epoch}")


def accepted(secrets: bytes = b"") -> bytes:
    """The answer to a hello that is let in."""
    return bytes((_ACCEPTED, len(secrets))) + secrets


def refused(why: str) -> bytes:
    """The answer to one that is not."""
    text = why.encode("utf-8", "replace")[:255]
    return bytes((_REFUSED, len(text))) + text


def read_answer(answer: bytes, who: str) -> bytes:
    """What came with the acceptance. Raises PipelineError with the peer's words if there is none."""
    if len(answer) < 2 or len(answer) != 2 + answer[1] or answer[0] not in (_ACCEPTED, _REFUSED):
        raise PipelineError(f"{who} ended the connection without an answer")
    if answer[0] == _REFUSED:
        raise PipelineError(f"{who} refuses the edge: {answer[2:].decode('utf-8', 'replace')}")
    return answer[2:]
