"""Kubernetes' structural schema as a strict JSON Schema: what the API server would prune without a word is an error."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft201909Validator, Draft202012Validator

_FOLDER = Path(__file__).with_name("crds")
CRD = _FOLDER / "rayservice-v1.json.gz"
KUBERNETES, COMPOSE = _FOLDER / "kubernetes-1.37.json.gz", _FOLDER / "compose-spec.json.gz"

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
def built_in(kind: str) -> Draft202012Validator:
    """Checks a ConfigMap, Service, StatefulSet or NetworkPolicy of Kubernetes 1.37."""
    known = json.loads(gzip.decompress(KUBERNETES.read_bytes()))
    return Draft202012Validator({"$ref": f"#/definitions/{known['roots'][kind]}", "definitions": known["definitions"]})


@cache
def compose() -> Draft201909Validator:
    """Checks a Compose file."""
    return Draft201909Validator(json.loads(gzip.decompress(COMPOSE.read_bytes())))


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


def complaints(document: Any, validator: Draft202012Validator | Draft201909Validator | None = None) -> list[str]:
    """What is wrong with a document, with the place of each. validator: of a RayService if not given."""
    found = (validator or ray_service()).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]
