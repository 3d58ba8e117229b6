"""What a controller asks of a stage of another operator, and what that one answers: canonical DAG-CBOR, no pickle.

Orders say which layers of which signed model to be, and who the neighbours are. Nothing in them names a path, a
program, a store, a device or an engine: those are the stage's own affair. Law: `decode_order(encode_order(o)) == o`,
and so for answers. Layout: PROTOCOL.md, "A stage of another operator".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, get_args

from serve_app.cluster.specs import StageSpec
from serve_app.cluster.wiring import Awaited, Joint
from serve_app.engine.engine import ActivationDtype, EngineProfile, KvDtype
from serve_app.errors import PipelineError, ProtocolError
from serve_app.receipts.identity import MAX_CERTIFICATE_BYTES, MAX_EPOCH
from serve_app.transport.handshake import EdgeAddress, Peer
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey

MAX_BYTES = 64 << 10
MAX_STAGES = 64
_MAX_LAYERS = 10_000  # twenty times the deepest model there is
_MAX_PAGE_SIZE, _MAX_PAGES, _MAX_REQUESTS = 1024, 1 << 28, 65_536  # as PipelineConfig
_MIN_LIFETIME_S, _MAX_LIFETIME_S = 60, 30 * 86_400
_MAX_AWAITED = 2  # the stage before; the Head
_MAX_GONE = 3
STAGE_ITSELF = "itself"  # among the neighbours that are gone: the stage that answers leaves for good
_MAX_TEXT = 1000  # characters of a reason
_MAX_NAME = 100
_MAX_HOST = 255
_MAX_BYTES_THERE = 1 << 50
_COUNTS = ["steps", "busy_ms", "load_ms", "parameter_bytes", "rows_hashed", "rows_reused", "rows_abandoned"]
_TEXTS = ["host", "device", "dtype"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ready:
    """Is anybody there?"""


@dataclass(frozen=True, slots=True)
class Ping:
    """What it is, and how busy."""


@dataclass(frozen=True, slots=True)
class ComputesFastIn:
    """Whether its device has arithmetic of this dtype."""

    dtype: ActivationDtype


@dataclass(frozen=True, slots=True)
class Take:
    """Be this stage, as StageHost.take."""

    epoch: int
    stage: int
    n_stages: int
    start: int
    stop: int
    manifest: Cid
    signature: Cid
    dtype: ActivationDtype
    page_size: int
    deterministic: bool
    kv_dtype: KvDtype
    lifetime_s: int  # of its session key

    @classmethod
    def of(cls, spec: StageSpec, dtype: ActivationDtype) -> Take:
        """What of a spec concerns a stage that has its own store, device and engine."""
        return cls(
            spec.epoch,
            spec.stage,
            spec.n_stages,
            spec.start,
            spec.stop,
            spec.manifest,
            spec.signature,
            dtype,
            spec.page_size,
            spec.deterministic,
            spec.kv_dtype,
            spec.session_lifetime_s,
        )


@dataclass(frozen=True, slots=True)
class Listen:
    """Let these neighbours in, over TCP."""

    epoch: int
    awaited: tuple[Awaited, ...]


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the edges to these, over TCP."""

    epoch: int
    head: Joint
    after: Joint | None
    n_pages: int
    max_requests: int


@dataclass(frozen=True, slots=True)
class TellTrouble:
    """Answered when a neighbour of this epoch is gone."""

    epoch: int


Order: TypeAlias = Ready | Ping | ComputesFastIn | Take | Listen | Connect | TellTrouble


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer to Take."""

    profile: EngineProfile
    certificate: Envelope
    load_ms: int
    opened_blocks: int
    max_pages: int  # of KV, that it has room for

    def to_value(self) -> Value:
        """The fields of the answer."""
        p = self.profile
        profile: dict[str, Value] = {
            "description": p.description,
            "device": p.device,
            "dtype": p.dtype,
            "hidden_size": p.hidden_size,
            "parameter_bytes": p.parameter_bytes,
            "kv_page_bytes": p.kv_page_bytes,
        }
        return {
            "profile": profile,
            "certificate": self.certificate.to_value(),
            "load_ms": self.load_ms,
            "opened": self.opened_blocks,
            "max_pages": self.max_pages,
        }

    @classmethod
    def from_value(cls, value: Value) -> Taken:
        """Read it. Nothing in it is believed of a node but its own certificate. Raises FormatError."""
        with Fields(value, "taken") as f:
            with Fields(f.any("profile"), "taken.profile") as p:
                profile = EngineProfile(
                    description=p.text("description", _MAX_TEXT),
                    device=p.text("device", _MAX_NAME),
                    dtype=_one_of(get_args(ActivationDtype), p, "dtype"),
                    hidden_size=p.integer("hidden_size", 1, 1 << 20),
                    parameter_bytes=p.integer("parameter_bytes", 0, _MAX_BYTES_THERE),
                    kv_page_bytes=p.integer("kv_page_bytes", 1, _MAX_BYTES_THERE),
                    memory_bytes=0,  # it says how many pages it has room for
                )
            certificate = Envelope.from_value(f.any("certificate"), "taken.certificate", MAX_CERTIFICATE_BYTES)
            load_ms, opened = f.integer("load_ms", 0, 1 << 40), f.integer("opened", 0, 1 << 32)
            return cls(profile, certificate, load_ms, opened, f.integer("max_pages", 1, _MAX_PAGES))


def encode_order(order: Order) -> bytes:
    """The bytes of an order."""
    fields: dict[str, Value]
    match order:
        case Ready():
            fields = {"do": "ready"}
        case Ping():
            fields = {"do": "ping"}
        case ComputesFastIn():
            fields = {"do": "fast", "dtype": order.dtype}
        case Take():
            fields = {"do": "take"} | {name: getattr(order, name) for name in Take.__slots__}
        case Listen():
            awaited: list[Value] = [
                {"edge": a.edge, "name": a.peer.name, "key": a.peer.key, "signed": a.signed} for a in order.awaited
            ]
            fields = {"do": "listen", "epoch": order.epoch, "awaited": awaited}
        case Connect():
            fields = {
                "do": "connect",
                "epoch": order.epoch,
                "head": _joint_value(order.head),
                "after": None if order.after is None else _joint_value(order.after),
                "n_pages": order.n_pages,
                "max_requests": order.max_requests,
            }
        case TellTrouble():
            fields = {"do": "trouble", "epoch": order.epoch}
    return canonical.encode({"v": 1, **fields})


def decode_order(data: bytes) -> Order:
    """Read encode_order's bytes. Raises ProtocolError."""
    try:
        with Fields(canonical.decode(data, max_bytes=MAX_BYTES), "order") as f:
            f.integer("v", 1, 1)
            return _order(f)
    except FormatError as e:
        raise ProtocolError(str(e)) from e


def _order(f: Fields) -> Order:
    what = f.text("do", 20)
    match what:
        case "ready":
            return Ready()
        case "ping":
            return Ping()
        case "fast":
            return ComputesFastIn(_one_of(get_args(ActivationDtype), f, "dtype"))
        case "take":
            return _take(f)
        case "listen":
            awaited = []
            for item in f.items("awaited", _MAX_AWAITED):
                with Fields(item, "order.awaited") as a:
                    awaited.append(Awaited(a.text("edge", _MAX_NAME), "tcp", _peer(a), a.boolean("signed")))
            return Listen(_epoch(f), tuple(awaited))
        case "connect":
            head, after = _joint(f.any("head")), f.any("after")
            return Connect(
                _epoch(f),
                head,
                None if after is None else _joint(after),
                f.integer("n_pages", 1, _MAX_PAGES),
                f.integer("max_requests", 1, _MAX_REQUESTS),
            )
        case "trouble":
            return TellTrouble(_epoch(f))
    raise ProtocolError(f"nothing is known here that is called {what!r}")


def _take(f: Fields) -> Take:
    take = Take(
        epoch=_epoch(f),
        stage=f.integer("stage", 0, MAX_STAGES - 1),
        n_stages=f.integer("n_stages", 1, MAX_STAGES),
        start=f.integer("start", 0, _MAX_LAYERS),
        stop=f.integer("stop", 1, _MAX_LAYERS),
        manifest=f.link("manifest"),
        signature=f.link("signature"),
        dtype=_one_of(get_args(ActivationDtype), f, "dtype"),
        page_size=f.integer("page_size", 1, _MAX_PAGE_SIZE),
        deterministic=f.boolean("deterministic"),
        kv_dtype=_one_of(get_args(KvDtype), f, "kv_dtype"),
        lifetime_s=f.integer("lifetime_s", _MIN_LIFETIME_S, _MAX_LIFETIME_S),
    )
    if take.stage >= take.n_stages or take.start >= take.stop:
        raise ProtocolError(
            f"stage {take.stage} of {take.n_stages} with layers [{take.start}, {take.stop}) is no stage of any pipeline"
        )
    return take


def answer(value: Value) -> bytes:
    """The bytes of an answer."""
    return canonical.encode({"v": 1, "ok": value})


def refusal(why: str) -> bytes:
    """The bytes of an answer that says why not."""
    return canonical.encode({"v": 1, "no": why.encode("utf-8", "replace").decode()[:_MAX_TEXT]})


def read_answer(data: bytes, who: str) -> Value:
    """What came back. Raises PipelineError with the words of a refusal, ProtocolError for what is no answer."""
    try:
        with Fields(canonical.decode(data, max_bytes=MAX_BYTES), "answer") as f:
            f.integer("v", 1, 1)
            if f.has("no"):
                raise PipelineError(f"{who} refuses: {f.text('no', _MAX_TEXT)}")
            return f.any("ok")
    except FormatError as e:
        raise ProtocolError(f"{who}: {e}") from e


def read_facts(value: Value) -> dict[str, Value]:
    """The answer to Ping: what a stage says of itself, for people. Raises FormatError."""
    if value == {}:
        return {}  # it is no stage now
    with Fields(value, "facts") as f:
        facts: dict[str, Value] = {name: f.integer(name, 0, _MAX_BYTES_THERE) for name in _COUNTS}
        layers: list[Value] = [*f.integers("layers", 2, 0, _MAX_LAYERS)]
        return facts | {name: f.text(name, _MAX_NAME) for name in _TEXTS} | {"layers": layers}


def facts_value(facts: dict[str, Value]) -> Value:
    """Of StageHost.facts, what read_facts reads."""
    return {name: facts[name] for name in (*_COUNTS, *_TEXTS, "layers")} if facts else {}


def read_gone(value: Value) -> frozenset[str]:
    """The answer to TellTrouble: the neighbours that are gone. Raises FormatError."""
    with Fields(value, "trouble") as f:
        found = f.items("gone", _MAX_GONE)
    names = frozenset(name for name in found if isinstance(name, str) and len(name) <= _MAX_NAME)
    if len(names) != len(found):
        raise FormatError("trouble.gone: expected different names")
    return names


def gone_value(gone: Iterable[str]) -> Value:
    """What read_gone reads."""
    names: list[Value] = [*sorted(gone)]
    return {"gone": names}


def read_nothing(value: Value) -> None:
    """The answer to Ready and Connect. Raises FormatError."""
    with Fields(value, "nothing"):
        pass


def read_port(value: Value) -> int | None:
    """The answer to Listen: where; None if nobody was to be awaited. Raises FormatError."""
    with Fields(value, "listen") as f:
        return f.optional_integer("port", 1, 65_535)


def read_flag(value: Value) -> bool:
    """The answer to ComputesFastIn. Raises FormatError."""
    with Fields(value, "fast") as f:
        return f.boolean("fast")


def _joint_value(joint: Joint) -> Value:
    assert joint.kind == "tcp" and joint.address is not None
    return {
        "edge": joint.edge,
        "name": joint.peer.name,
        "key": joint.peer.key,
        "host": joint.address.host,
        "port": joint.address.port,
        "signed": joint.signed,
    }


def _joint(value: Value) -> Joint:
    with Fields(value, "order.joint") as f:
        address = EdgeAddress(None, f.text("host", _MAX_HOST), f.integer("port", 1, 65_535))
        return Joint(f.text("edge", _MAX_NAME), "tcp", _peer(f), address, None, f.boolean("signed"))


def _peer(f: Fields) -> Peer:
    return Peer(f.text("name", _MAX_NAME), PublicKey(f.data("key", KEY_BYTES, KEY_BYTES)), 0)


def _epoch(f: Fields) -> int:
    return f.integer("epoch", 0, MAX_EPOCH)


def _one_of(allowed: tuple[T, ...], f: Fields, name: str) -> T:
    found = f.text(name, 20)
    for value in allowed:
        if value == found:
            return value
    raise FormatError(f"{name}: {found!r}, expected one of {', '.join(map(str, allowed))}")
