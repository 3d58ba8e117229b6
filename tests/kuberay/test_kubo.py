"""IPFS nodes in Kubernetes and Compose: known fields, one source of settings, and nobody reaches what commands them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kuberay
from shard_tools.ipfs_daemon import ARGUMENTS, ENVIRONMENT, DaemonSettings, configured, container_script
from shard_tools.sources import open_gateway, open_ipfs
from tests.kuberay.crd_schema import built_in, complaints, compose

FOLDER = Path(kuberay.__file__).parent
CONTAINER = DaemonSettings(host="0.0.0.0")
FREE = {"labels", "matchLabels", "requests", "limits", "data"}  # their keys are the user's; a Service's selector too
CONFIG = {  # as `ipfs init` writes it since 0.37, in what matters here
    "Identity": {"PeerID": "12D3"},
    "Bootstrap": ["auto"],
    "DNS": {"Resolvers": {".": "auto"}},
    "Ipns": {"DelegatedPublishers": ["auto"], "RecordLifetime": ""},
    "Routing": {"DelegatedRouters": ["auto"]},
    "Discovery": {"MDNS": {"Enabled": True}},
    "Addresses": {"API": "/ip4/127.0.0.1/tcp/5001", "Swarm": ["/ip4/0.0.0.0/udp/4001/quic-v1"], "NoAnnounce": []},
    "Swarm": {"Transports": {"Network": {}, "Security": {}}, "ConnMgr": {}},
}
STAND_IN = f"""#!{sys.executable}
# `ipfs config --json KEY VALUE`, and words of other commands noted.
import json, os, sys
words = sys.argv[1:]
if words[:2] != ["config", "--json"]:
    print(*words, file=open(os.environ["NOTES"], "a"))
    print("12D3KooW" + "a" * 44 if words[-1] == "<id>" else "")
    raise SystemExit("kubo-1" in words[0])
path = os.environ["IPFS_PATH"] + "/config"
config = json.load(open(path))
*above, last = words[2].split(".")
place = config
for name in above:
    place = place.setdefault(name, {{}})
place[last] = json.loads(words[3])
json.dump(config, open(path, "w"))
"""


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML readers keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key is there twice: {keys} {node.start_mark}"
        return super().construct_mapping(node, deep)


def read(name: str) -> list[Any]:
    """The documents of a file, fresh, YAML's shared parts written out."""
    documents: list[Any] = json.loads(json.dumps(list(yaml.load_all((FOLDER / name).read_bytes(), Strict))))
    return documents


def kubo() -> dict[tuple[str, str], Any]:
    return {(document["kind"], document["metadata"]["name"]): document for document in read("kubo.yaml")}


def mappings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from mappings(item, (*path, key))


def test_every_document_is_what_kubernetes_knows() -> None:
    documents = kubo()
    assert [kind for kind, _ in documents] == ["ConfigMap", "Service", "Service", "StatefulSet", "NetworkPolicy"]
    for (kind, _), document in documents.items():
        assert complaints(document, built_in(kind)) == []


PLACES = [(name, path) for name, document in kubo().items() for path in mappings(document)]


@pytest.mark.parametrize(("name", "path"), PLACES, ids=str)
def test_an_unknown_field_is_refused_at_any_depth(name: tuple[str, str], path: tuple[str | int, ...]) -> None:
    document = kubo()[name]
    place = document
    for step in path:
        place = place[step]
    place["unknwon"] = "1"
    free = FREE & set(path) or (name[0], path) == ("Service", ("spec", "selector"))
    assert bool(complaints(document, built_in(name[0]))) == (not free)


def test_a_compose_file_is_what_compose_knows() -> None:
    (document,) = read("compose.yaml")
    assert complaints(document, compose()) == []
    for path in mappings(document):
        (document,) = read("compose.yaml")
        place = document
        for step in path:
            place = place[step]
        place["unknwon"] = 1
        assert bool(complaints(document, compose())) == (path[-1:] != ("environment",))


def test_the_nodes_settings_have_one_source() -> None:
    """Script, ConfigMap, Compose file and `llmd node start` say the same; whoever changes one is told here."""
    script = container_script(CONTAINER)
    assert (FOLDER / "private-swarm.sh").read_text() == script, (
        "write container_script's text there, and into kubo.yaml"
    )
    data = kubo()["ConfigMap", "kubo-scripts"]["data"]
    assert data == {name: (FOLDER / name).read_text() for name in ("private-swarm.sh", "introduce.sh")}
    node, (document,) = containers()["kubo"], read("compose.yaml")
    service = document["services"]["kubo"]
    assert node["args"] == service["command"] == list(ARGUMENTS)
    environment = {"IPFS_PATH": "/data/ipfs", **ENVIRONMENT}
    assert {item["name"]: item["value"] for item in node["env"]} == service["environment"] == environment
    assert node["image"] == service["image"] == containers()["introduce"]["image"]
    assert node["image"].partition(":")[2].startswith("v0.4"), "by version, and one that has these settings"


def containers() -> dict[str, Any]:
    pod = kubo()["StatefulSet", "kubo"]["spec"]["template"]["spec"]
    return {container["name"]: container for container in pod["containers"]}


def run(script: str, folder: Path, *programs: tuple[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The script by sh, with stand-ins for what the image has."""
    for name, text in (("ipfs", STAND_IN), *programs):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "NOTES": str(folder / "notes"), "IPFS_PATH": str(folder)}
    return subprocess.run(
        ["sh", FOLDER / script], env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60
    )


def test_the_script_makes_of_a_configuration_what_llmd_node_start_makes(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(json.dumps(CONFIG))
    install = '#!/bin/sh\necho "$@" > "$IPFS_PATH/installed"\n'
    done = run("private-swarm.sh", tmp_path, ("install", install))
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "config").read_text())
    assert made == configured(CONFIG, CONTAINER) != CONFIG
    assert "auto" not in json.dumps(made), "the daemon refuses such a word once AutoConf is off"
    assert (tmp_path / "installed").read_text().split() == [
        "-m",
        "0600",
        "/run/secrets/swarm.key",
        f"{tmp_path}/swarm.key",
    ]
    assert run("private-swarm.sh", tmp_path, ("install", "#!/bin/sh\nexit 1\n")).returncode != 0


def test_nodes_are_told_of_each_other_and_one_that_is_down_stops_nobody(tmp_path: Path) -> None:
    """The stand-in says no for kubo-1. The loop ends here, where it would sleep."""
    done = run("introduce.sh", tmp_path, ("sleep", '#!/bin/sh\nkill "$PPID"\n'), LLMD_NODES="3")
    assert done.returncode != 0
    identity = "12D3KooW" + "a" * 44
    assert (tmp_path / "notes").read_text().splitlines() == [
        "--api=/dns4/kubo-0.kubo-nodes/tcp/5001 --timeout=5s id -f <id>",
        f"--api=/ip4/127.0.0.1/tcp/5001 --timeout=10s swarm connect /dns4/kubo-0.kubo-nodes/tcp/4001/p2p/{identity}",
        "--api=/dns4/kubo-1.kubo-nodes/tcp/5001 --timeout=5s id -f <id>",
        "--api=/dns4/kubo-2.kubo-nodes/tcp/5001 --timeout=5s id -f <id>",
        f"--api=/ip4/127.0.0.1/tcp/5001 --timeout=10s swarm connect /dns4/kubo-2.kubo-nodes/tcp/4001/p2p/{identity}",
    ]


def test_names_ports_volumes_and_counts_agree() -> None:
    documents = kubo()
    stateful, nodes = documents["StatefulSet", "kubo"]["spec"], documents["Service", "kubo-nodes"]["spec"]
    door, pod = documents["Service", "kubo"]["spec"], stateful["template"]["spec"]
    assert (
        stateful["serviceName"] == "kubo-nodes" and nodes["clusterIP"] == "None" and nodes["publishNotReadyAddresses"]
    )
    labels = stateful["template"]["metadata"]["labels"]
    assert labels == stateful["selector"]["matchLabels"] == nodes["selector"] == door["selector"]
    assert {"name": "LLMD_NODES", "value": str(stateful["replicas"])} in containers()["introduce"]["env"]
    ports = {port["name"]: port["containerPort"] for port in containers()["kubo"]["ports"]}
    assert ports == {"swarm": CONTAINER.swarm_port, "rpc": CONTAINER.api_port, "gateway": CONTAINER.gateway_port}
    for port in (*nodes["ports"], *door["ports"]):
        assert ports[port["targetPort"]] == port["port"]
    volumes = {volume["name"] for volume in (*pod["volumes"], *({"name": "repository"},))}
    assert stateful["volumeClaimTemplates"][0]["metadata"]["name"] == "repository"
    for container in containers().values():
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert set(container["resources"]) == {"requests", "limits"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    alive = containers()["kubo"]["readinessProbe"]["exec"]["command"]
    assert alive[0] == "ipfs" and alive[-1] == "id" and f"/tcp/{CONTAINER.api_port}" in alive[1]


def test_only_nodes_reach_what_commands_them_and_stages_read_by_a_gateway() -> None:
    rules = kubo()["NetworkPolicy", "kubo"]["spec"]
    assert rules["policyTypes"] == ["Ingress", "Egress"]
    reached = {port["port"]: rule["from"] for rule in rules["ingress"] for port in rule["ports"]}
    nodes = [{"podSelector": rules["podSelector"]}]
    assert reached["swarm"] == reached["rpc"] == nodes and set(reached) == {"swarm", "rpc", "gateway"}
    (service, *_) = read("rayservice.yaml")
    roles = {
        g["template"]["metadata"]["labels"]["llmd-role"]
        for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    (selector,) = reached["gateway"]
    assert set(selector["podSelector"]["matchExpressions"][0]["values"]) == roles
    assert all("ipBlock" not in peer for rule in rules["egress"] for peer in rule["to"]), "nothing leaves the cluster"


def test_a_compose_node_commands_are_for_its_host_alone(tmp_path: Path) -> None:
    (document,) = read("compose.yaml")
    service = document["services"]["kubo"]
    ports = [port.removesuffix("/tcp") for port in service["ports"]]
    assert ports == [f"{CONTAINER.swarm_port}:4001", "127.0.0.1:5001:5001", "127.0.0.1:8080:8080"]
    assert set(service["secrets"]) == set(document["secrets"]) and set(service["networks"]) == set(document["networks"])
    assert {volume.split(":")[0] for volume in service["volumes"]} == {*document["volumes"], "./private-swarm.sh"}
    assert document["secrets"]["swarm.key"]["file"] == "./swarm.key"
    assert "kuberay/swarm.key" in (FOLDER.parent / ".gitignore").read_text().split()
    open_ipfs(cache=str(tmp_path), api="/ip4/127.0.0.1/tcp/5001/http")  # as its comment says
    open_gateway(cache=str(tmp_path), urls="http://127.0.0.1:8080")
