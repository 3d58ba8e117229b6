"""What an auditor asks a stage of another operator about the rows it keeps: to hold them, to show a piece, to let go.

Part of stage_orders.py's language, in a file of its own. A piece is at most PIECE_BYTES long; how long all is, the
auditor knows from the statement. Layout: PROTOCOL.md, "A stage of another operator".
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.receipts.statement import HASH_BYTES, MAX_ATTEMPTS
from shard_tools.canonical import Fields, Value
from shard_tools.errors import FormatError

# Each is a connection of its own, so that this many bytes are worth a handshake, and few enough to be at hand twice.
PIECE_BYTES = 1 << 20
_MAX_START = 1 << 40


@dataclass(frozen=True, slots=True)
class HoldRows:
    """As Retention.hold."""

    request: bytes
    attempt: int
    promised: bool


@dataclass(frozen=True, slots=True)
class ShowRows:
    """As Showing.piece, shorter."""

    request: bytes
    attempt: int
    start: int


@dataclass(frozen=True, slots=True)
class ReleaseRows:
    """As Showing.release."""

    request: bytes
    attempt: int
    promised: bool


RowOrder = HoldRows | ShowRows | ReleaseRows


def row_fields(order: RowOrder) -> dict[str, Value]:
    """The fields of an order."""
    name: dict[str, Value] = {"request": order.request, "attempt": order.attempt}
    match order:
        case HoldRows():
            return {"do": "hold", **name, "promised": order.promised}
        case ShowRows():
            return {"do": "show", **name, "start": order.start}
        case ReleaseRows():
            return {"do": "release", **name, "promised": order.promised}


def row_order(what: str, f: Fields) -> RowOrder | None:
    """The order that is called so, or None. Raises FormatError."""
    if what not in ("hold", "show", "release"):
        return None
    request, attempt = f.data("request", HASH_BYTES, HASH_BYTES), f.integer("attempt", 0, MAX_ATTEMPTS)
    if what == "show":
        return ShowRows(request, attempt, f.integer("start", 0, _MAX_START))
    return (HoldRows if what == "hold" else ReleaseRows)(request, attempt, f.boolean("promised"))


def piece_value(piece: bytes | None) -> Value:
    """What read_piece reads."""
    return {"piece": piece}


def read_piece(value: Value) -> bytes | None:
    """The answer to ShowRows: shorter than PIECE_BYTES if it is the last; None if its rows are not there.

    Raises FormatError.
    """
    with Fields(value, "show") as f:
        piece = f.any("piece")
    if piece is not None and not (isinstance(piece, bytes) and len(piece) <= PIECE_BYTES):
        raise FormatError(f"show.piece: expected at most {PIECE_BYTES} bytes, or null")
    return piece
