"""JSON schemas of what Kubernetes takes: its own, and KubeRay's from ``kuberay_fields.yaml``; no unknown fields."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

KUBERNETES = "v1.37.0-local-strict"
_PLAIN: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "integer": {"type": "integer", "minimum": 0},
    "number": {"type": "number", "minimum": 0},
    "boolean": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
}
_GROUPS = {"v1": "core.v1", "networking.k8s.io/v1": "networking.v1"}


@cache
def _kubernetes() -> dict[str, Any]:
    """Kubernetes' definitions, in which an object takes the properties that are listed and no others."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / KUBERNETES
    definitions: dict[str, Any] = json.loads((folder / "_definitions.json").read_text())
    return definitions


def _definition(name: str) -> dict[str, str]:
    full = f"io.k8s.{'apimachinery.pkg.apis' if name.startswith('meta.') else 'api'}.{name}"
    assert full in _kubernetes()["$defs"], f"Kubernetes has no {full}"
    return {"$ref": f"{_kubernetes()['$id']}#/$defs/{full}"}


@cache
def _kuberay() -> dict[str, Any]:
    types = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())

    def schema(kind: Any) -> dict[str, Any]:
        if isinstance(kind, list):
            return {"type": "array", "items": schema(kind[0])}
        if kind.startswith("k8s:"):
            return _definition(kind.removeprefix("k8s:"))
        if kind in types:
            return {"$ref": f"#/$defs/{kind}"}
        return _PLAIN.get(kind) or {"enum": kind.split("|")}

    def record(name: str, fields: dict[str, Any]) -> dict[str, Any]:
        # The name of a kind is also that of its type.
        properties = {
            field.rstrip("!"): {"enum": [name]} if field == "kind!" else schema(kind) for field, kind in fields.items()
        }
        required = [field.rstrip("!") for field in fields if field.endswith("!")]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return {"$id": "urn:kuberay", "$defs": {name: record(name, fields) for name, fields in types.items()}}


@cache
def _validator(api: str, kind: str) -> Draft202012Validator:
    wanted = {"$ref": f"urn:kuberay#/$defs/{kind}"} if api == "ray.io/v1" else _definition(f"{_GROUPS[api]}.{kind}")
    dialect = "https://json-schema.org/draft/2020-12/schema"
    known = [(s["$id"], Resource.from_contents({**s, "$schema": dialect})) for s in (_kubernetes(), _kuberay())]
    return Draft202012Validator(wanted, registry=Registry().with_resources(known))


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest: ``path: message``, one for each place."""
    found = _validator(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]
