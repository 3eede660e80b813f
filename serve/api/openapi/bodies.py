"""Schemas of the bodies that are taken: those of the parsers' own models, with what may come beside their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from serve.api import openai_messages
from serve.api.embeddings import MOST_INPUTS
from serve.api.inference_api import NamedPart, RequestBody
from serve.api.openai_parameters import ASKS_WHEN_EMPTY, HARMLESS, NEUTRAL, OF_ROUTE
from serve.api.openai_requests import (
    AllowedTools,
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    NamedTool,
    TranscriptionRequest,
)
from serve.api.responses import requests as items

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
ROUTES: tuple[type[Body], ...] = (
    *(ChatRequest, CompletionRequest, EmbeddingsRequest),
    *(items.ResponsesRequest, TranscriptionRequest),
)
"""Bodies beside whose fields parameters may come that ask for nothing."""
READ_BY_TYPE: tuple[type[BaseModel], ...] = (
    *(items.MessageItem, items.MessagePart, items.CallItem, items.ResultItem, items.ReasoningItem),
    *(items.FunctionTool, items.ChosenFunction, items.ChosenFunctions, items.TextFormat, items.SchemaFormat),
)
"""Parts that a Responses request has as plain objects."""
NOTHING: Schema = {"$ref": REFERENCE.format(model="Nothing")}
"""Values that ask for nothing under any name."""
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
BOUNDS: dict[str, Schema] = {
    "top_p": {"minimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "min_tokens": {"minimum": 0},
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
}
"""What SamplingParams asks of numbers."""


class _Plain(GenerateJsonSchema):
    """Schemas without a title for each field."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas() -> dict[str, Schema]:
    """Return the bodies' schemas and those that they refer to, by name."""
    kinds: list[type[BaseModel]] = [*ROUTES, *READ_BY_TYPE, NamedTool, AllowedTools, NamedPart, RequestBody]
    _, made = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=REFERENCE, schema_generator=_Plain
    )
    found: dict[str, Schema] = made["$defs"]
    for (name, field), schema in _read_by_hand().items():
        found[name]["properties"][field] = schema
    for kind in ROUTES:
        own = found[kind.__name__]["properties"]
        found[kind.__name__]["properties"] = {**dict(_beside(kind)), **{name: _bound(name, own[name]) for name in own}}
    for each in (*ROUTES, *READ_BY_TYPE):
        _take_empty(found, found[each.__name__])
    found["Message"]["properties"] |= {name: {} for name in sorted(openai_messages.HARMLESS)}
    found["Message"]["additionalProperties"] = {"anyOf": [NOTHING, {"enum": [False]}]}
    empty = [{"enum": [None, "", []]}, {"type": "object", "additionalProperties": NOTHING}]
    return {**found, "Nothing": {"anyOf": empty}}


def reference(name: str) -> Schema:
    """Return a reference to a schema."""
    return {"$ref": REFERENCE.format(model=name)}


def _read_by_hand() -> dict[tuple[str, str], Schema]:
    """Return the schemas of fields whose values are read by their types."""
    item = [reference(name) for name in ("MessageItem", "CallItem", "ResultItem", "ReasoningItem")]
    parts = {"anyOf": [{"type": "string"}, {"type": "array", "items": reference("MessagePart")}]}
    choices = [reference("ChosenFunction"), reference("ChosenFunctions"), {"enum": ["none", "auto", "required", None]}]
    formats = [reference("TextFormat"), reference("SchemaFormat"), {"enum": [None, {}]}]
    tools = [{"type": "array", "items": reference("FunctionTool")}, {"type": "null"}]
    return {
        ("CompletionRequest", "prompt"): {"anyOf": [*_texts({"type": "string"}), {"type": "null"}]},
        ("EmbeddingsRequest", "input"): {"anyOf": _texts({"type": "string", "minLength": 1}, MOST_INPUTS)},
        ("TranscriptionRequest", "file"): {"type": "string", "format": "binary"},
        ("MessageItem", "content"): parts,
        ("ResultItem", "output"): parts,
        ("ResponsesRequest", "input"): {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": item}, "minItems": 1}]
        },
        ("ResponsesRequest", "tools"): {"anyOf": tools},
        ("ResponsesRequest", "tool_choice"): {"anyOf": choices},
        ("TextSettings", "format"): {"anyOf": formats},
    }


def _texts(text: Schema, most: int | None = None) -> list[Schema]:
    """Return the forms of serve/api/texts.py: one text or several, as such or as token ids."""
    bound = {"minItems": 1} if most is None else {"minItems": 1, "maxItems": most}
    several = [{"type": "array", "items": each, **bound} for each in (text, TOKEN_IDS)]
    return [text, TOKEN_IDS, *several]


def _beside(kind: type[Body]) -> Iterator[tuple[str, Schema]]:
    """Yield the parameters that a route takes beside its fields: any value, or those that ask for nothing."""
    neutral = NEUTRAL | OF_ROUTE.get(kind, {})
    for name in sorted((HARMLESS | neutral.keys()) - kind.model_fields.keys()):
        empty: Schema = {"type": "null"} if name in ASKS_WHEN_EMPTY else NOTHING
        values = [{"enum": list(neutral[name])}] if neutral.get(name) else []
        yield name, {"anyOf": [empty, *values]} if name in neutral else {}


def _bound(name: str, schema: Schema) -> Schema:
    """Return a field's schema with what its numbers are bound by."""
    if name not in BOUNDS:
        return schema
    parts = [part if part == {"type": "null"} else {**part, **BOUNDS[name]} for part in schema["anyOf"]]
    return {**schema, "anyOf": parts}


def _take_empty(found: dict[str, Schema], schema: Any) -> None:
    """Say of an object and those inside it that unknown names may come with empty values."""
    for each in _inside(schema):
        if each.get("additionalProperties") is False:
            names = {part["$ref"].rpartition("/")[2] for part in _inside(each) if "$ref" in part} - {"Nothing"}
            each["additionalProperties"] = NOTHING
            for name in names:
                _take_empty(found, found[name])


def _inside(schema: Any) -> Iterator[Schema]:
    """Yield the objects of a schema, itself first."""
    if isinstance(schema, dict):
        yield schema
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _inside(each)
