"""What the KubeRay operator checks beyond its CRD, as far as our manifest comes near it.

Source: ray-operator/controllers/ray/utils/validation.go, v1.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME_CHARS = 47  # the operator appends its own to the name of a RayService
TOKEN_AUTH_SINCE = (2, 52)


def broken_rules(service: Any) -> Iterator[str]:
    """Each rule that a schema-valid RayService breaks."""
    name, spec = service["metadata"]["name"], service["spec"]
    cluster = spec["rayClusterConfig"]
    if not _DNS_1035.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        yield f"metadata.name {name!r} is no DNS-1035 label of at most {MAX_NAME_CHARS} characters"
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService has a name of its own"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
        if version < TOKEN_AUTH_SINCE:
            yield f"token authentication needs rayVersion 2.52 or later, found {cluster.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not supported for a RayService"
    yield from _group(cluster["headGroupSpec"], "head")
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len(set(names)) != len(names):
        yield f"two worker groups have one name: {names}"
    for group in cluster.get("workerGroupSpecs", []):
        yield from _group(group, group["groupName"])
        if not cluster.get("enableInTreeAutoscaling") and not {"minReplicas", "maxReplicas"} <= set(group):
            yield f"{group['groupName']}: without the autoscaler both minReplicas and maxReplicas are needed"
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0):
            yield f"{group['groupName']}: replicas are not between minReplicas and maxReplicas"


def _group(group: Any, name: str) -> Iterator[str]:
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: no container"
    for key, params in (("labels", {"labels"}), ("resources", {"num-cpus", "num-gpus", "memory", "resources"})):
        if group.get(key) and params & set(group.get("rayStartParams", {})):
            yield f"{name}: {key} are given twice, in the group and in rayStartParams"
