"""The config file: what it says is what is meant, or it is refused with a hint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import config
from serve_app.choices import check_choices, store_folder
from serve_app.config import AppConfig, IngressConfig, ModelConfig, PipelineConfig, keys_of
from serve_app.errors import ConfigError
from serve_app.serve_file import load_config, parse_serve_config
from shard_tools.choice import Choice
from shard_tools.signing import Signer, key_text

EXAMPLE = Path(config.__file__).with_name("config.yaml")
MODEL = {"name": "m", "store": "/store", "trust": ["/publisher.pub"]}
FREE = {"node_labels", "runtime_env"}  # their keys are the user's


def document() -> dict[str, Any]:
    """The documented example, fresh."""
    loaded: dict[str, Any] = yaml.safe_load(EXAMPLE.read_bytes())
    return loaded


def refusal(change: Callable[[dict[str, Any]], object]) -> str:
    """Why the example, changed like this, is refused."""
    changed = document()
    change(changed)
    with pytest.raises(ConfigError) as caught:
        parse_serve_config(yaml.safe_dump(changed).encode())
    return str(caught.value)


def args_of(changed: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = changed["applications"][0]["args"]
    return args


def mappings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in a document mappings stand."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from mappings(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from mappings(item, (*path, i))


def test_the_documented_example_says_every_key_and_every_default() -> None:
    file = load_config(EXAMPLE)
    assert file.app == AppConfig(ModelConfig("smollm2-135m-instruct", "~/.llmd/store", ("~/.llmd/keys/publisher.pub",)))
    assert file.url == "http://127.0.0.1:8000"

    def check(keys: Any, said: dict[str, Any]) -> None:
        assert set(keys) == set(said)
        for key, below in keys.items():
            if below is not None and said[key] == []:  # what an entry would hold stands beside it, in words
                assert all(f"{name}: " in EXAMPLE.read_text() for name in below)
            elif below is not None and said[key] is not None:
                check(below, said[key])

    check(keys_of(AppConfig), args_of(document()))


def test_a_config_is_frozen_all_the_way_down() -> None:
    app = AppConfig.parse({"model": MODEL})
    with pytest.raises(FrozenInstanceError):
        app.pipeline.stages = 3  # type: ignore[misc]
    assert all(is_dataclass(getattr(app, f.name)) for f in fields(app))
    assert app.pipeline == PipelineConfig() and app.ingress == IngressConfig()


@pytest.mark.parametrize("path", list(mappings(document())), ids=str)
def test_an_unknown_key_is_refused_wherever_it_stands(path: tuple[str | int, ...]) -> None:
    def change(changed: Any) -> None:
        for step in path:
            changed = changed[step]
        changed["unknwon"] = 1

    if not FREE & set(path):
        assert "unknown key 'unknwon'" in refusal(change)


@pytest.mark.parametrize(
    ("where", "wrong", "right"),
    [
        ((), "applicatoins", "applications"),
        (("http_options",), "hots", "host"),
        (("applications", 0), "route_prefx", "route_prefix"),
        (("applications", 0, "args"), "pipline", "pipeline"),
        (("applications", 0, "args", "pipeline"), "kvpages", "kv_pages"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest_known_one(where: tuple[Any, ...], wrong: str, right: str) -> None:
    def change(changed: Any) -> None:
        for step in where:
            changed = changed[step]
        changed[wrong] = 1

    assert f"did you mean {right!r}?" in refusal(change)


OUTSIDE = {"stage": 1, "address": "10.0.0.2:7070", "key": "llmd-ed25519:" + "1" * 64}


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("pipeline", {"stages": 0}, "args.pipeline.stages: Input should be greater than or equal to 1"),
        ("pipeline", {"stages": "2"}, "valid integer (found '2')"),
        ("pipeline", {"stages": True}, "valid integer"),
        ("pipeline", {"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
        ("pipeline", {"kv_pages": -1}, "args.pipeline.kv_pages"),
        ("pipeline", {"gpus_per_stage": float("nan")}, "args.pipeline.gpus_per_stage"),
        ("pipeline", [], "args.pipeline: Input should be an object"),
        ("model", {"name": "m"}, "args.model.store is missing"),
        ("model", MODEL | {"store": "relative/store"}, "is relative; write an absolute path"),
        ("model", MODEL | {"store": "~nobody-of-this-name/store"}, "a user who has none on this machine"),
        ("model", MODEL | {"trust": []}, "at least 1"),
        ("model", MODEL | {"trust": ["llmd-ed25519:00"]}, "args.model.trust.0: 'llmd-ed25519:00' is not a public key"),
        ("pipeline", {"outside": [OUTSIDE, dict(OUTSIDE)]}, "stages [1, 1] are not different ones of the 2 there are"),
        ("pipeline", {"outside": [OUTSIDE | {"stage": 2}]}, "stages [2] are not different ones"),
        ("pipeline", {"outside": [OUTSIDE | {"address": "10.0.0.2"}]}, "expected host:port, such as 10.0.0.2:7070"),
        ("pipeline", {"outside": [OUTSIDE | {"key": "llmd-ed25519:00"}]}, "is not a public key"),
        ("pipeline", {"outside": [{"stage": 1}]}, "args.pipeline.outside.0.address is missing"),
        ("pipeline", {"outside": [OUTSIDE], "replicas": 2}, "a stage outside is part of one pipeline at a time"),
        ("pipeline", {"replicas": 0}, "args.pipeline.replicas: Input should be greater than or equal to 1"),
        ("pipeline", {"replicas": 65}, "args.pipeline.replicas: Input should be less than or equal to 64"),
        ("ingress", {"api_keys": {}}, "names no key"),
        ("ingress", {"api_keys": {"sha256": ["abc"]}}, "64 lower-case hex digits"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(group: str, values: Any, said: str) -> None:
    assert said in refusal(lambda changed: args_of(changed).update({group: values}))


SQLITE = {"kind": "sqlite", "path": "/m.db"}
FOLDER = {"kind": "directory", "path": "/store"}


def test_a_store_an_index_and_an_engine_are_chosen_by_a_plain_text_or_by_a_kind_with_options() -> None:
    """A text is what it was before there were kinds: a folder, or a name."""
    plain = AppConfig.parse({"model": MODEL, "pipeline": {"engine": "torch"}})
    assert (plain.model.store, plain.pipeline.engine) == (Path("/store"), Choice("torch"))
    chosen = AppConfig.parse(
        {"model": MODEL | {"store": SQLITE, "index": SQLITE}, "pipeline": {"engine": {"kind": "x", "bits": 8}}}
    )
    assert chosen.model.store == chosen.model.index == Choice.of("sqlite", path="/m.db")
    assert chosen.pipeline.engine == Choice.of("x", bits=8)
    assert AppConfig.parse({"model": MODEL}).pipeline.engine == Choice("auto")


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("model", MODEL | {"store": {"path": "/m.db"}}, "args.model.store: expected a folder, or `{kind: name}`"),
        ("model", MODEL | {"store": 5}, "args.model.store: expected a folder, or `{kind: name}`"),
        ("model", MODEL | {"store": {"kind": 5}}, "args.model.store: expected `{kind: name}`"),
        ("model", MODEL | {"index": SQLITE | {"path": ["/m"]}}, "args.model.index: option 'path' is no text"),
        ("model", MODEL | {"index": SQLITE | {"path": "x" * 5000}}, "option 'path' is longer than 4096"),
        ("model", MODEL | {"index": {"kind": "k"} | {f"o{i}": i for i in range(40)}}, "40 options"),
        ("pipeline", {"engine": ["torch"]}, "args.pipeline.engine: expected a name, or `{kind: name}`"),
    ],
)
def test_a_choice_that_is_none_is_named(group: str, values: Any, said: str) -> None:
    assert said in refusal(lambda changed: args_of(changed).update({group: values}))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": MODEL, "pipeline": {"engine": "troch"}}, "args.pipeline.engine: no engine is called 'troch'; did"),
        ({"model": MODEL | {"store": SQLITE, "index": "/i"}}, "args.model.store: no block store is called 'sqlite'"),
        ({"model": MODEL | {"store": SQLITE}}, "args.model.store: no block store is called 'sqlite'"),
        ({"model": MODEL | {"store": FOLDER}}, "args.model.index must be given, since model.store is no folder"),
        ({"model": MODEL | {"index": SQLITE}}, "args.model.index: no model index is called 'sqlite'; known here: dir"),
    ],
)
def test_a_name_that_nothing_here_has_is_refused_before_anything_starts(args: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_choices(AppConfig.parse(args))
    assert said in str(caught.value)


def test_a_command_that_knows_folders_only_says_so() -> None:
    with pytest.raises(ConfigError, match="is of the kind 'sqlite', and this command reads folders only"):
        store_folder(AppConfig.parse({"model": MODEL | {"store": SQLITE, "index": SQLITE}}).model)


def test_publishers_are_keys_or_files_of_one(tmp_path: Path) -> None:
    one, two = Signer.fresh().public, Signer.fresh().public
    (tmp_path / "two.pub").write_text(key_text(two) + "\n")
    app = AppConfig.parse({"model": MODEL | {"trust": [key_text(one), str(tmp_path / "two.pub")]}})
    assert app.model.publishers().publishers_of("any") == {one, two}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", None])
def test_listening_beyond_loopback_without_a_key_is_refused(host: str | None) -> None:
    def expose(changed: dict[str, Any]) -> None:
        changed["http_options"].pop("host")  # Serve's own default is every address
        if host:
            changed["http_options"]["host"] = host

    assert "Set ingress.api_keys.file" in refusal(expose)
    changed = document()
    expose(changed)
    args_of(changed)["ingress"]["api_keys"] = {"file": "/keys"}
    assert parse_serve_config(yaml.safe_dump(changed).encode()).host == (host or "0.0.0.0")


def test_every_other_way_to_be_reached_from_outside_needs_a_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HAProxy" in refusal(lambda changed: args_of(changed)["ingress"].update(proxy="haproxy"))
    assert "0.0.0.0" in refusal(lambda changed: changed["applications"][0].update(host="0.0.0.0"))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert "HAProxy" in refusal(lambda changed: None)


def test_one_switch_turns_haproxy_on() -> None:
    app = AppConfig.parse({"model": MODEL, "ingress": {"proxy": "haproxy", "api_keys": {"file": "/keys"}}})
    assert app.environment()["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert AppConfig.parse({"model": MODEL}).environment()["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    changed = copy.deepcopy(document())
    changed["http_options"]["host"] = host
    assert parse_serve_config(yaml.safe_dump(changed).encode()).host == host


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "expected a Ray Serve config"),
        (b"- a\n- b", "expected a Ray Serve config"),
        (b"{", "is not YAML"),
        (b"[" * 1500, "is not YAML"),
        (b"a: &x 1\nb: *x", "aliases are not accepted (line 2)"),
        (b"target_capacity: 1\ntarget_capacity: 2", "stands twice"),
        (b"#" * (2 << 20), "larger than"),
        (b"!!python/object/apply:os.system [true]", "is not YAML"),
        (b"applications: []", "exactly one application"),
        (b"applications:\n- import_path: os:system", "expected 'serve_app.cluster.application:build'"),
        (b"http_options: 5", "config.http_options: expected keys"),
        (b"applications: [5]", "config.applications[0]: expected keys"),
        (b"http_options: [{host: a}]", "config.http_options: expected keys"),
        (b"1: 2", "unknown key '1'"),
        (b"\xff\xfe\xff", "is not YAML"),
    ],
)
def test_what_is_no_config_of_ours_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_serve_config(text)
    assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_config(tmp_path / "absent.yaml")


def test_the_file_is_the_one_named_else_the_environments_else_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMD_CONFIG", raising=False)
    assert config.config_path(None) == EXAMPLE
    monkeypatch.setenv("LLMD_CONFIG", "/etc/llmd.yaml")
    assert config.config_path(None) == Path("/etc/llmd.yaml")
    assert config.config_path(Path("/mine.yaml")) == Path("/mine.yaml")
