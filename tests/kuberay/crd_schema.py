"""Kubernetes' structural schema as a strict JSON Schema: what the API server would prune without a word is an error."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

CRD = Path(__file__).with_name("crds") / "rayservice-v1.json.gz"

# The API server knows these from its own ObjectMeta; the CRD says only "object".
_OBJECT_META = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@cache
def ray_service() -> Draft202012Validator:
    """Checks a RayService (v1)."""
    schema = strict(json.loads(gzip.decompress(CRD.read_bytes())))
    schema["properties"]["metadata"] = _OBJECT_META
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def strict(node: Any) -> Any:
    """The schema with every object closed, except where Kubernetes keeps unknown fields on purpose."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: strict(item) for key, item in node.items() if key != "properties"}
    if "properties" in node:  # names of fields, not keywords: a field may be called `type`
        out["properties"] = {name: strict(item) for name, item in node["properties"].items()}
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    if isinstance(out.get("type"), str) and node.get("nullable"):
        out["type"] = [out["type"], "null"]
    if out.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def complaints(document: Any) -> list[str]:
    """What is wrong with a RayService, with the place of each."""
    return [f"{error.json_path}: {error.message}" for error in ray_service().iter_errors(document)]
