"""One value, one spelling: strict DAG-CBOR without floats.

Laws: `decode(encode(x)) == x`; `encode(decode(b)) == b` or decode raises.
Floats are refused both ways: whatever is signed here counts in integers, so that no two machines
can round it apart. Source: https://ipld.io/specs/codecs/dag-cbor/spec/
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import cbrrr

from shard_tools.cid import Cid
from shard_tools.errors import FormatError

Value: TypeAlias = "bool | int | str | bytes | Cid | list[Value] | dict[str, Value] | None"
T = TypeVar("T")

MAX_DEPTH = 16  # our deepest value, a receipt bundle, nests 8 deep

# A list of these alone needs no second look: decoding a million token ids takes 0.2 s instead of 1.9 s.
_PLAIN = frozenset((int, bytes))


def encode(value: Value) -> bytes:
    """The only bytes that mean `value`. Raises FormatError for what DAG-CBOR or this project cannot say."""
    try:
        return bytes(cbrrr.encode_dag_cbor(_to_wire(value, 0)))
    except (TypeError, ValueError, OverflowError) as e:
        raise FormatError(f"cannot be written as DAG-CBOR: {e}") from e


def decode(data: bytes, *, max_bytes: int) -> Value:
    """What `data` says. Raises FormatError if it is larger than max_bytes or not in canonical form."""
    if len(data) > max_bytes:
        raise FormatError(f"{len(data)} bytes of DAG-CBOR where at most {max_bytes} are accepted")
    try:
        value = _from_wire(cbrrr.decode_dag_cbor(data), 0)
    except (TypeError, ValueError, OverflowError, EOFError) as e:
        raise FormatError(f"not canonical DAG-CBOR: {e}") from e
    if encode(value) != data:
        raise FormatError("not canonical DAG-CBOR: it encodes to other bytes")
    return value


def _to_wire(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"nests deeper than {MAX_DEPTH}")
    if isinstance(value, Cid):
        return cbrrr.CID(bytes(value))
    if isinstance(value, dict):
        return {key: _to_wire(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if depth < MAX_DEPTH and _PLAIN.issuperset(map(type, value)):
            return list(value)
        return [_to_wire(item, depth + 1) for item in value]
    if isinstance(value, float):
        raise FormatError(f"floats are not written: {value}")
    return value


def _from_wire(value: Any, depth: int) -> Value:
    if depth > MAX_DEPTH:
        raise FormatError(f"nests deeper than {MAX_DEPTH}")
    if isinstance(value, cbrrr.CID):
        return Cid.from_bytes(bytes(value))
    if isinstance(value, dict):
        return {key: _from_wire(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        if depth < MAX_DEPTH and _PLAIN.issuperset(map(type, value)):
            return value
        return [_from_wire(item, depth + 1) for item in value]
    if isinstance(value, float):
        raise FormatError("floats are not accepted")
    return value  # type: ignore[no-any-return]


class Fields:
    """Reads a decoded map field by field, refusing what is missing, mistyped, out of range or unknown.

        with Fields(value, "manifest") as f:
            size = f.integer("size", 0, MAX_SHARD_BYTES)

    Leaving the block raises FormatError if a field was never asked for.
    """

    def __init__(self, value: Value, what: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{what}: expected a map, found {type(value).__name__}")
        self._left = dict(value)
        self._what = what

    def __enter__(self) -> Fields:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self._left:
            raise FormatError(f"{self._what}: unknown field {sorted(self._left)[0]!r}")

    def has(self, name: str) -> bool:
        """Whether an optional field is present."""
        return name in self._left

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value = self._take(name, int)
        if isinstance(value, bool) or not low <= value <= high:
            raise FormatError(f"{self._what}.{name}: {value} is not in [{low}, {high}]")
        return value

    def boolean(self, name: str) -> bool:
        return self._take(name, bool)

    def text(self, name: str, max_chars: int) -> str:
        value = self._take(name, str)
        if len(value) > max_chars:
            raise FormatError(f"{self._what}.{name}: longer than {max_chars} characters")
        return value

    def data(self, name: str, min_bytes: int, max_bytes: int) -> bytes:
        value = self._take(name, bytes)
        if not min_bytes <= len(value) <= max_bytes:
            raise FormatError(f"{self._what}.{name}: {len(value)} bytes, not in [{min_bytes}, {max_bytes}]")
        return value

    def link(self, name: str) -> Cid:
        return self._take(name, Cid)

    def items(self, name: str, max_items: int) -> list[Value]:
        value = self._take(name, list)
        if len(value) > max_items:
            raise FormatError(f"{self._what}.{name}: {len(value)} items, more than {max_items}")
        return value

    def integers(self, name: str, max_items: int, low: int, high: int) -> tuple[int, ...]:
        """A list of integers, each in [low, high]."""
        out = []
        for item in self.items(name, max_items):
            if not isinstance(item, int) or isinstance(item, bool) or not low <= item <= high:
                raise FormatError(f"{self._what}.{name}: {item!r} is not an integer in [{low}, {high}]")
            out.append(item)
        return tuple(out)

    def map(self, name: str) -> dict[str, Value]:
        return self._take(name, dict)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or None where the field is null; the field itself must be present."""
        if self._left.get(name, 0) is None:
            del self._left[name]
            return None
        return self.integer(name, low, high)

    def any(self, name: str) -> Value:
        """A field of whatever type, for a parser of its own."""
        return self._take(name, object)  # type: ignore[return-value]

    def _take(self, name: str, kind: type[T]) -> T:
        if name not in self._left:
            raise FormatError(f"{self._what}: field {name!r} is missing")
        value = self._left.pop(name)
        if not isinstance(value, kind):
            raise FormatError(f"{self._what}.{name}: expected {kind.__name__}, found {type(value).__name__}")
        return value
