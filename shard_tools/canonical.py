"""One value, one spelling: strict DAG-CBOR without floats.

Laws: `decode(encode(x)) == x`; `encode(decode(b)) == b` or decode raises.
Floats are refused both ways: whatever is signed here counts in integers, so that no two machines
can round it apart. Source: https://ipld.io/specs/codecs/dag-cbor/spec/
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import cbor2

from shard_tools.cid import Cid
from shard_tools.errors import FormatError

Value: TypeAlias = "bool | int | str | bytes | Cid | list[Value] | dict[str, Value] | None"
T = TypeVar("T")

MAX_DEPTH = 16  # our deepest value, a receipt bundle, nests 8 deep
_LINK_TAG = 42
_INT_LOW, _INT_HIGH = -(1 << 64), (1 << 64) - 1  # what CBOR says without bignum tags
_PLAIN = (type(None), bool, str, bytes)


def encode(value: Value) -> bytes:
    """The only bytes that mean `value`. Raises FormatError for what DAG-CBOR or this project cannot say."""
    try:
        return cbor2.dumps(_to_wire(value, 0), canonical=True)
    except (cbor2.CBOREncodeError, UnicodeEncodeError) as e:
        raise FormatError(f"cannot be written as DAG-CBOR: {e}") from e


def decode(data: bytes, *, max_bytes: int) -> Value:
    """What `data` says. Raises FormatError if it is larger than max_bytes or not in canonical form."""
    if len(data) > max_bytes:
        raise FormatError(f"{len(data)} bytes of DAG-CBOR where at most {max_bytes} are accepted")
    try:
        said = cbor2.loads(
            data,
            max_depth=MAX_DEPTH + 2,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, OverflowError) as e:
        raise FormatError(f"not canonical DAG-CBOR: {e}") from e
    value = _from_wire(said, 0)
    # Whatever else the library is lenient about (long integers, order of keys, bytes after the end) has other
    # canonical bytes than these.
    if encode(value) != data:
        raise FormatError("not canonical DAG-CBOR: it encodes to other bytes")
    return value


def _to_wire(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"nests deeper than {MAX_DEPTH}")
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, int):
        return _in_range(value)
    if isinstance(value, Cid):
        return cbor2.CBORTag(_LINK_TAG, b"\0" + bytes(value))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise FormatError("a map's keys must be text")
        return {key: _to_wire(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(value) if _all_small(value) else [_to_wire(item, depth + 1) for item in value]
    raise FormatError(f"{type(value).__name__} is not written")


def _from_wire(value: Any, depth: int) -> Value:
    if depth > MAX_DEPTH:
        raise FormatError(f"nests deeper than {MAX_DEPTH}")
    if isinstance(value, _PLAIN):
        return value
    if type(value) is int:
        return _in_range(value)
    if isinstance(value, cbor2.CBORTag):
        if value.tag != _LINK_TAG or not isinstance(value.value, bytes) or value.value[:1] != b"\0":
            raise FormatError("the only tag accepted is 42, of a binary CID")
        return Cid.from_bytes(value.value[1:])
    if type(value) is dict:
        if not all(isinstance(key, str) for key in value):
            raise FormatError("a map's keys must be text")
        return {key: _from_wire(item, depth + 1) for key, item in value.items()}
    if type(value) is list:
        return value if _all_small(value) else [_from_wire(item, depth + 1) for item in value]
    raise FormatError(f"{type(value).__name__} is not accepted")


def _in_range(value: int) -> int:
    if not _INT_LOW <= value <= _INT_HIGH:
        raise FormatError(f"an integer of {value.bit_length()} bits: 64 are the most")
    return value


def _all_small(values: Any) -> bool:
    """Whether a list holds ints of CBOR's range alone: then no item needs a look of its own (five times as fast)."""
    if not values or set(map(type, values)) != {int}:
        return False
    return bool(min(values) >= _INT_LOW and max(values) <= _INT_HIGH)


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
