"""kuberay/rayservice.yaml holds only what the CRD and the operator know, and carries the application's own config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import kuberay
from serve_app import config
from serve_app.errors import ConfigError
from serve_app.serve_file import ServeFile, load_config, parse_serve_config
from tests.kuberay.crd_schema import complaints
from tests.kuberay.operator_rules import broken_rules

MANIFEST = Path(kuberay.__file__).with_name("rayservice.yaml")
EXAMPLE = Path(config.__file__).with_name("config.yaml")
FREE = {"labels", "annotations", "rayStartParams", "requests", "limits"}  # their keys are the user's


AS_JSON = json.dumps(list(yaml.safe_load_all(MANIFEST.read_bytes())))  # which also writes YAML's shared parts out


def documents() -> list[Any]:
    """The RayService and the Service, fresh."""
    read: list[Any] = json.loads(AS_JSON)
    return read


def carried() -> ServeFile:
    return parse_serve_config(documents()[0]["spec"]["serveConfigV2"].encode())


def mappings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield path
    for key, item in items:
        yield from mappings(item, (*path, key))


def settings(value: Any, path: str = "") -> dict[str, Any]:
    """A config tree as one flat table."""
    if not is_dataclass(value):
        return {path: value}
    return {k: v for f in fields(value) for k, v in settings(getattr(value, f.name), f"{path}.{f.name}").items()}


def test_the_manifest_is_valid_and_keeps_the_operators_rules() -> None:
    service, front = documents()
    assert complaints(service) == []
    assert list(broken_rules(service)) == []
    assert (front["apiVersion"], front["kind"]) == ("v1", "Service")


@pytest.mark.parametrize("path", list(mappings(documents()[0])), ids=str)
def test_an_unknown_key_is_refused_at_any_depth(path: tuple[str | int, ...]) -> None:
    service = documents()[0]
    place = service
    for step in path:
        place = place[step]
    place["unknwon"] = "1"
    assert bool(complaints(service)) == (not FREE & set(path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "two"),
        (("spec", "rayClusterConfig", "rayVersion"), 2.6),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "maybe"),
        (("spec", "serveConfigV2"), {"applications": []}),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    service = documents()[0]
    place: Any = service
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert complaints(service)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["metadata"].update(name="x" * 48), "47"),
        (lambda s: s["spec"]["rayClusterConfig"].update(rayVersion="2.51.0"), "2.52"),
        (lambda s: s["spec"]["rayClusterConfig"]["authOptions"].update(enableK8sTokenAuth=True), "not supported"),
        (lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas=5), "between"),
        (lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("maxReplicas"), "both"),
        (lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(groupName="stage"), "one name"),
        (
            lambda s: s["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["rayStartParams"].update(labels="a=b"),
            "twice",
        ),
        (lambda s: s["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(containers=[]), "head"),
    ],
)
def test_each_of_the_operators_rules_is_looked_at(change: Any, said: str) -> None:
    service = documents()[0]
    change(service)
    assert said in " ".join(broken_rules(service))


def test_it_carries_the_documented_config_but_for_what_the_cluster_changes() -> None:
    """README.md's table; whoever changes one of the two files changes the other, or this list."""
    ours, theirs = settings(load_config(EXAMPLE).app), settings(carried().app)
    assert {key: theirs[key] for key in theirs if theirs[key] != ours.get(key)} == {
        ".model.store": Path("/var/lib/llmd/store"),
        ".model.trust": ("/etc/llmd/trust/publisher.pub",),
        ".pipeline.threads_per_stage": 3,
        ".pipeline.node_labels": {"llmd-role": "stage"},
        ".ingress.node_labels": {"llmd-role": "ingress"},
        ".ingress.api_keys.file": Path("/etc/llmd/keys/api-keys"),
        ".ingress.api_keys.sha256": (),
        ".identity.state_dir": Path("/var/lib/llmd/state"),
    }
    local, cluster = load_config(EXAMPLE).document, carried().document
    assert cluster["http_options"] == local["http_options"] | {"host": "0.0.0.0"}
    assert (local["proxy_location"], cluster["proxy_location"]) == ("HeadOnly", "EveryNode")


def test_the_carried_config_cannot_lose_its_keys() -> None:
    text = documents()[0]["spec"]["serveConfigV2"].replace(
        "api_keys: {file: /etc/llmd/keys/api-keys}", "api_keys: null"
    )
    with pytest.raises(ConfigError, match="no API key is asked for"):
        parse_serve_config(text.encode())


def test_labels_paths_and_counts_agree_within_the_manifest() -> None:
    service, front = documents()
    groups = {g["groupName"]: g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    app = carried().app
    assert groups["stage"]["replicas"] == app.pipeline.stages * app.pipeline.replicas
    assert groups["stage"]["labels"] == app.pipeline.node_labels
    (stage,) = groups["stage"]["template"]["spec"]["containers"]
    assert app.pipeline.threads_per_stage != "auto", "auto counts the other pods' CPUs too"
    assert app.pipeline.threads_per_stage < int(stage["resources"]["limits"]["cpu"]), "no room for the Head"
    assert groups["ingress"]["labels"] == app.ingress.node_labels
    assert front["spec"]["selector"] == groups["ingress"]["template"]["metadata"]["labels"]
    assert groups["stage"]["template"]["metadata"]["labels"] != front["spec"]["selector"]
    assert front["spec"]["ports"][0]["targetPort"] == carried().port
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    for pod in (head, *groups.values()):
        spec = pod["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in (*spec["containers"], *spec["initContainers"]):
            assert {m["name"] for m in container["volumeMounts"]} <= volumes
            assert {"requests", "limits"} == set(container["resources"])
        # Secrets are files. By environment comes only what Serve takes in no other way, as `llmd serve` gives it.
        switches = [{"name": name, "value": value} for name, value in app.environment().items() if value != "0"]
        assert [container.get("env") for container in spec["containers"]] == [switches]
        assert not any("env" in container for container in spec["initContainers"])
    mounted = {m["mountPath"] for m in groups["ingress"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert app.ingress.api_keys is not None and app.ingress.api_keys.file is not None
    for path in (app.model.store, app.ingress.api_keys.file.parent, Path(app.model.trust[0]).parent):
        assert str(path) in mounted
    assert "readinessProbe" in groups["stage"]["template"]["spec"]["containers"][0]
    assert "readinessProbe" not in groups["ingress"]["template"]["spec"]["containers"][0]
