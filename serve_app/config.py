"""The whole configuration: read once at the door, unknown keys refused, frozen afterwards.

One YAML file serves the laptop, a Ray cluster and a RayService: a Ray Serve config file whose `applications[0].args` is
an AppConfig (`serve_app/config.yaml` is the documented example). Inner code receives plain values out of it. `~` is the
home of the user who runs the process that parses.

Environment variables that count, all of them read here:
    LLMD_CONFIG                  the config file when the command line names none
    RAY_SERVE_ENABLE_HA_PROXY    Ray's own switch; read only because HAProxy listens on every address
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from serve_app.errors import ConfigError
from serve_app.known_keys import refuse_unknown
from serve_app.serve_keys import Keys
from shard_tools.choice import Choice, absolute_path
from shard_tools.cid import Cid
from shard_tools.errors import FormatError, InputError
from shard_tools.signing import parse_key
from shard_tools.trust import TrustPolicy
from shard_tools.trust_root import read_trust

_CLOSED = ConfigDict(extra="forbid")
_KEY_TEXT = "llmd-ed25519:"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _everywhere_the_same(path: Path) -> Path:
    """The path with `~` expanded. A relative one would mean another folder on every node, so it is refused."""
    try:
        return absolute_path(str(path))
    except InputError as e:
        raise ValueError(str(e)) from e


def _cid(text: str) -> str:
    try:
        return str(Cid.parse(text))
    except FormatError as e:
        raise ValueError(str(e)) from e


def _key_or_file(text: str) -> str:
    if text.startswith(_KEY_TEXT):
        try:
            parse_key(text)
        except InputError as e:
            raise ValueError(str(e)) from e
        return text
    return str(_everywhere_the_same(Path(text)))


def _key(text: str) -> str:
    try:
        parse_key(text)
    except InputError as e:
        raise ValueError(str(e)) from e
    return text


def _host_and_port(text: str) -> str:
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("expected host:port, such as 10.0.0.2:7070")
    return host, int(port)


def _folder_or_choice(value: object) -> Path | Choice:
    """A text is a folder; anything else names a kind and its options."""
    if isinstance(value, str | Path):
        return _everywhere_the_same(Path(value))
    return _choice(value, "a folder, or `{kind: name}` with the options of that kind beside it")


def _name_or_choice(value: object) -> Choice:
    """A text is a name; anything else names a kind and its options."""
    if isinstance(value, str):
        return Choice(value)
    return _choice(value, "a name, or `{kind: name}` with the options of that kind beside it")


def _choice(value: object, expected: str) -> Choice:
    if isinstance(value, Choice):
        return value
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError(f"expected {expected}")
    try:
        return Choice.parse(value)
    except InputError as e:
        raise ValueError(str(e)) from e


def _digest(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError("expected the SHA-256 of a key as 64 lower-case hex digits")
    return text


AbsolutePath = Annotated[Path, AfterValidator(_everywhere_the_same)]
Trusted = Annotated[str, Field(max_length=4096), AfterValidator(_key_or_file)]
FolderOrChoice = Annotated[Path | Choice, PlainValidator(_folder_or_choice)]
NameOrChoice = Annotated[Choice, PlainValidator(_name_or_choice)]
CalibrationCid = Annotated[str, AfterValidator(_cid)]
Digest = Annotated[str, AfterValidator(_digest)]
HostAndPort = Annotated[str, Field(max_length=255), AfterValidator(_host_and_port)]
NodeKey = Annotated[str, Field(max_length=100), AfterValidator(_key)]
NodeLabels = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)]


@dataclass(frozen=True, slots=True, config=_CLOSED)
class ModelConfig:
    """Which model, where its blocks are, and whose word for it counts."""

    name: Annotated[str, Field(min_length=1, max_length=256)]  # as published, and as clients ask for it
    store: FolderOrChoice  # folder of the block store, on each node; or another kind of store, by name
    trust: Annotated[tuple[Trusted, ...], Field(min_length=1, max_length=64)]  # publishers: key text, or file of one
    # the CID that the name must lead to; null: to whatever it leads when the application starts. Either way later
    # releases of the name are not served until the configuration changes
    manifest: Annotated[str, Field(max_length=256)] | None = None
    index: FolderOrChoice | None = None  # whose names/ leads from names to manifests; null: the folder of the store

    def publishers(self) -> TrustPolicy:
        """What `trust` means now. Reads its files; raises InputError for one that cannot be read or does not hold."""
        return read_trust(self.trust, int(time.time()))


@dataclass(frozen=True, slots=True, config=_CLOSED)
class OutsideConfig:
    """A stage that another operator runs (`llmd stage`)."""

    stage: Annotated[int, Field(ge=0, le=63)]
    address: HostAndPort  # where it takes orders
    key: NodeKey  # of its node, as it prints it; the registry vouches for it from then on
    # how long requests wait for one that cannot be reached before it is replaced; a cut link of 10 s is no death
    grace_s: Annotated[int, Field(ge=0, le=120)] = 20  # the Head waits 180 s for all of a repair
    stand_in: bool = (
        True  # the cluster keeps room for a process of its own in its place; else a spare, or nobody, takes it
    )


@dataclass(frozen=True, slots=True, config=_CLOSED)
class PipelineConfig:
    """How the model is cut over machines, and how much each stage may hold at once."""

    # whole pipelines, of `stages` each, between which requests are divided. Another number is no other version: what
    # serves goes on. Those without room wait for it, and the others serve
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    stages: Annotated[int, Field(ge=1, le=64)] = 2  # two is the least that shows the point: nobody holds it all
    # where the cluster has no room for all: fewer, each with more layers, down to so many. null: all, or none at all
    stages_at_least: Annotated[int, Field(ge=1, le=64)] | None = None
    # processes that wait, each in a bundle of its own, with a GPU if stages have one, to take the place of a stage that
    # dies. The n-th holds the layers of stage n: if that one dies, nothing is loaded. Without any, one starts then
    spares: Annotated[int, Field(ge=0, le=64)] = 0
    outside: Annotated[tuple[OutsideConfig, ...], Field(max_length=64)] = ()  # stages that run without our Ray
    placement: Literal["even"] = "even"  # equal layer counts; the only planner so far
    engine: NameOrChoice = Choice("auto")  # auto: the fastest that computes the model on this device
    deterministic: bool = False  # the same bits whatever the batch, for exact verification; several times slower
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where Ray has a GPU for every stage, else cpu
    # auto: the manifest's, or float32 where a stage's CPU has no arithmetic of the manifest's (16 rows of bfloat16 took
    # 2.4x as long as float32 on such a one); the shards' values are the same either way
    dtype: Literal["auto", "manifest", "float32", "bfloat16", "float16"] = "auto"
    # of keys and values in pages. auto: that of the activations. fp8: e4m3 with a scale per position and head, half
    # the memory of bfloat16 and each element up to 6 % off; only the GPU engine knows it
    kv_dtype: Literal["auto", "fp8"] = "auto"
    page_size: Annotated[int, Field(ge=1, le=1024)] = 16  # tokens; waste is half a page per request, 8 tokens
    kv_pages: Annotated[int, Field(ge=1, le=1 << 28)] | Literal["auto"] = "auto"  # auto: what kv_memory_bytes holds
    kv_memory_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30  # per stage, not on cuda; 1 GiB suits an 8 GiB laptop
    # per step; bounds how long a prompt delays others. auto: 512, on cuda 8192 (about 40 ms of an 8B model on an H100)
    max_step_tokens: Annotated[int, Field(ge=1, le=1 << 17)] | Literal["auto"] = "auto"
    # running at once. auto: 64 rows, which fill a CPU's matrix units; on cuda 256
    max_requests: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = "auto"
    max_waiting: Annotated[int, Field(ge=0, le=1 << 20)] = 256  # admitted, not yet running; beyond it clients get 429
    prefix_cache: bool = True  # beginnings that pages hold are not computed again; page_size must be a multiple of 16
    # tokens that a sequence may guess in a step, out of what it said before; answers stay the same. Off: it gains only
    # where answers repeat (code that is edited, quotes) and few run at a time, and guesses that are wrong cost rows
    speculate: Annotated[int, Field(ge=0, le=8)] = 0  # 8: messages/step.py
    threads_per_stage: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"  # auto: a fair share
    gpus_per_stage: Annotated[float, Field(gt=0, le=1)] = 1.0  # only on cuda; less than 1 shares a GPU, as in tests
    # a stage that has become four times slower than its own pace while the others have not is told of. replace: a spare
    # takes its place, once it has spent crawl_s of its steps so. report: where hosts are shared it may pass by itself
    crawl: Literal["report", "replace"] = "report"
    crawl_s: Annotated[float, Field(ge=9, le=86_400)] = 30.0  # the first 9 s pass before it is told of
    # how rows go from stage to stage. auto: shared memory on one host, TLS between hosts; tcp: TLS everywhere; ray:
    # Ray's actor calls, at many times the cost (benchmarks/edges.py), neither encrypted nor pinned to the registry
    edges: Literal["auto", "ray", "tcp"] = "auto"
    node_labels: NodeLabels = field(default_factory=dict)  # Ray node labels that a stage's node must have; {}: any node
    # a new version waits so long for room beside the one it replaces; then that one ends first. More where nodes are
    # added on demand
    beside_s: Annotated[float, Field(ge=0, le=3600)] = 10.0

    def __post_init__(self) -> None:
        outside = [entry.stage for entry in self.outside]
        if len(set(outside)) != len(outside) or any(stage >= self.stages for stage in outside):
            raise ValueError(f"outside: stages {outside} are not different ones of the {self.stages} there are")

        if outside and self.replicas > 1:
            raise ValueError("replicas: a stage outside is part of one pipeline at a time; make it 1, or outside empty")
        if self.stages_at_least is not None and (self.stages_at_least > self.stages or outside):
            raise ValueError("stages_at_least: not more than stages, and not with stages outside")

    @property
    def roomless(self) -> frozenset[int]:
        """Stages that the cluster has no room for, since others run them."""
        return frozenset(entry.stage for entry in self.outside if not entry.stand_in)


@dataclass(frozen=True, slots=True, config=_CLOSED)
class ApiKeysConfig:
    """Where the keys that clients must show come from: a file, hashes, or both."""

    file: AbsolutePath | None = None  # one key a line, or `sha256:` and the key's hash; `#` begins a comment
    sha256: Annotated[tuple[Digest, ...], Field(max_length=10_000)] = ()

    def __post_init__(self) -> None:
        if self.file is None and not self.sha256:
            raise ValueError("names no key: give `file` or `sha256`, or write `api_keys: null` for none at all")


@dataclass(frozen=True, slots=True, config=_CLOSED)
class IngressConfig:
    """The HTTP side."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1  # one parses and streams about 50 requests/s on a core
    proxy: Literal["serve", "haproxy"] = "serve"  # haproxy: 5x the requests/s, but it listens on every address
    api_keys: ApiKeysConfig | None = None  # null: open to whoever can connect, hence loopback only
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0  # what runs on a replica or version that ends has so long
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 8 << 20  # a 1M-token prompt is about 5 MB of text
    node_labels: NodeLabels = field(default_factory=dict)  # as pipeline.node_labels, for the ingress replicas' nodes


@dataclass(frozen=True, slots=True, config=_CLOSED)
class AuditConfig:
    """Which answers are computed again, one stage of each, and drawn again, by an auditor of the operator's."""

    rate: Annotated[float, Field(ge=0, le=1)] = 0.0  # of all answers, drawn after they were signed for; 0: none
    # clients may ask for `audited` answers: 429 when there is no room for their rows; for `exact` ones where stages are
    # deterministic on CPUs and the auditor's profile is theirs
    on_request: bool = False
    # on the host, for rows of each stage, while anything is audited: 2 GiB are 130,000 positions at width 4096
    retain_bytes: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    calibration: Annotated[tuple[CalibrationCid, ...], Field(max_length=256)] = ()  # blocks of `llmd audit calibrate`
    band: Annotated[
        tuple[CalibrationCid, ...], Field(max_length=256)
    ] = ()  # the same command's, of how tokens are drawn
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # of the auditor, which yields to everything else on its host
    # stages sign for the rows that they send, so that of two that differ one is named; auto: where one is another
    # operator's (inside one cluster, which is one trust domain, a name says nothing)
    deliveries: Literal["auto", "always", "never"] = "auto"

    @property
    def on(self) -> bool:
        """Whether anything is audited, so that rows are kept."""
        return self.rate > 0 or self.on_request


@dataclass(frozen=True, slots=True, config=_CLOSED)
class IdentityConfig:
    """Who signs, and who vouches for the signers."""

    state_dir: AbsolutePath = Path("~/.llmd").expanduser()  # a node's key, operator.pub; outside Ray's object store
    operator_key: AbsolutePath | None = None  # null: state_dir/operator.key, made at first use; for one machine
    registry: AbsolutePath | None = None  # signed list of node keys; null: made with operator_key
    session_lifetime_s: Annotated[int, Field(ge=60, le=30 * 86_400)] = 86_400  # a day: a leaked session key dies soon

    @property
    def seen(self) -> Path:
        """Where the newest releases that were ever seen here are noted."""
        return self.state_dir / "seen"


@dataclass(frozen=True, slots=True, config=_CLOSED)
class AppConfig:
    """The args of our Serve application."""

    model: ModelConfig
    pipeline: PipelineConfig = PipelineConfig()
    ingress: IngressConfig = IngressConfig()
    audit: AuditConfig = AuditConfig()
    identity: IdentityConfig = IdentityConfig()

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> AppConfig:
        """The frozen form of `args`. Raises ConfigError naming the key at fault, and the nearest known one."""
        if not isinstance(args, Mapping):
            raise ConfigError(f"args: expected keys and values, found a {type(args).__name__}")
        refuse_unknown(args, keys_of(cls), "args")
        try:
            # Through JSON: strict parsing then takes a list for a tuple and text for a path, and nothing else.
            return TypeAdapter(cls).validate_json(json.dumps(dict(args)), strict=True)
        except ValidationError as e:
            raise ConfigError("\n".join(_complaints(e))) from e
        except (TypeError, ValueError) as e:
            raise ConfigError(f"args hold something that is neither text, number, list nor mapping: {e}") from e

    def environment(self) -> dict[str, str]:
        """What must be set before Ray starts, on head and workers alike: `ingress.proxy`, and one default of Serve's.

        By that, an ingress that answers no health check gets 10 s more to end, and whoever waits for it waits on.
        """
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1" if self.ingress.proxy == "haproxy" else "0",
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        }


def keys_of(tree: type) -> Keys:
    """The keys of a config dataclass, in the form of serve_keys."""
    hints = get_type_hints(tree)
    below = {f.name: _dataclass_in(hints[f.name]) for f in fields(tree)}
    return {name: keys_of(kind) if kind else None for name, kind in below.items()}


def config_path(named: Path | None) -> Path:
    """The config file to read: the one named, else LLMD_CONFIG, else the documented example beside this file."""
    return named or Path(os.environ.get("LLMD_CONFIG") or Path(__file__).with_name("config.yaml"))


def haproxy_is_forced() -> bool:
    """Whether this process's environment makes Serve use HAProxy whatever the config says."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0").lower() in ("1", "true")


def _dataclass_in(hint: Any) -> type | None:
    """The group of keys below a key; a Choice is none, since its keys are its factory's."""
    if isinstance(hint, type) and is_dataclass(hint) and hint is not Choice:
        return hint
    return next((kind for kind in map(_dataclass_in, get_args(hint)) if kind), None)


def _complaints(error: ValidationError) -> Iterator[str]:
    """One line for each thing that is wrong, without those that only follow from one further down."""
    places = [_place(e["loc"]) for e in error.errors()]
    for e, place in zip(error.errors(), places, strict=True):
        if any(other.startswith(f"{place}.") for other in places):
            continue
        if e["type"] == "missing":
            yield f"{place} is missing; serve_app/config.yaml shows every key"
        else:
            yield f"{place}: {e['msg'].removeprefix('Value error, ')} (found {str(e['input'])[:100]!r})"


def _place(loc: tuple[int | str, ...]) -> str:
    # pydantic puts the name of the tried alternative ("constrained-int", "literal['auto']") after the key
    return ".".join(["args", *(str(part) for part in loc if isinstance(part, int) or part.isidentifier())])
