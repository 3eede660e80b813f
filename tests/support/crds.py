"""KubeRay's CRDs, which lie beside the project and not in it, as strict validators: an unknown field is an error.

What an API server does first is done here too: nulls of fields that take none are dropped, and defaults are filled in.
Not seen: the values of plain strings, CEL rules and the operator's own rules; `cluster/kubernetes/ray_shape.py` has
those that matter to us.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]
VARIABLE = "TANDEM_KUBERAY_CRDS"
BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "kuberay" / "v1.7.0"
LIMITS = {"int32": 31, "int64": 63}
VALUE_CHECKS = ("allOf", "anyOf", "oneOf")


def folder() -> Path:
    """Return where the CRDs of KubeRay 1.7 are: $TANDEM_KUBERAY_CRDS, or beside the project."""
    return Path(os.environ.get(VARIABLE) or BESIDE)


def missing() -> str | None:
    """Say loudly what is not checked where they are missing; None: they are there."""
    if list(folder().glob("ray.io_*.yaml")):
        return None
    return f"NOT CHECKED AGAINST KUBERAY'S SCHEMAS: no CRDs in {folder()}; set {VARIABLE} to a folder of ray.io_*.yaml"


def findings(each: dict[str, Any]) -> list[str]:
    """List what the CRD of an object's kind refuses in it. Raises KeyError for a kind that has none."""
    raw, validator = _schemas()[each["apiVersion"], each["kind"]]
    filled = copy.deepcopy(each)
    _fill(raw, filled)
    errors = sorted(validator.iter_errors(filled), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:150]}" for error in errors]


@cache
def _schemas() -> dict[tuple[str, str], tuple[Schema, Draft202012Validator]]:
    found = {}
    for path in sorted(folder().glob("ray.io_*.yaml")):
        crd = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            raw = version["schema"]["openAPIV3Schema"]
            closed = _closed(raw)
            closed["properties"]["metadata"] = _metadata()
            key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            found[key] = raw, Draft202012Validator(closed)
    return found


def _metadata() -> Schema:
    text, texts = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
    properties = {"name": text, "namespace": text, "labels": texts, "annotations": texts}
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": ["name"]}


def _closed(schema: Schema) -> Schema:
    """Return a structural schema with every object closed, in the words of JSON Schema."""
    made: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: _closed(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            made[key] = _closed(value)
        elif key in VALUE_CHECKS or not (key.startswith("x-") or key in ("description", "default", "format")):
            made[key] = value
    made.pop("nullable", None)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    opened = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not opened:
        made["additionalProperties"] = False
    if (bits := LIMITS.get(schema.get("format", ""))) is not None:
        made = {"minimum": -(2**bits), "maximum": 2**bits - 1, **made}
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


def _fill(schema: Schema, value: Any) -> None:
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for each in value:
            _fill(schema["items"], each)
    if not isinstance(value, dict):
        return
    properties = schema.get("properties", {})
    for key, inner in properties.items():
        if key in value and value[key] is None and not inner.get("nullable"):
            del value[key]
        if key not in value and "default" in inner:
            value[key] = copy.deepcopy(inner["default"])
        if key in value:
            _fill(inner, value[key])
    further = schema.get("additionalProperties")
    if isinstance(further, dict):
        for key in value.keys() - properties.keys():
            _fill(further, value[key])
