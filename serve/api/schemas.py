"""JSON schemas that answers must follow: a keyword that nothing here follows is refused, with its place. Pure.

Whoever compiles a schema passes over keywords that it does not know, as JSON Schema has it: a misspelt one, one of
another draft than `$schema` says, one of another dialect. The answer would be checked by nothing, and look as if.
What is known and not followed (`not`, `uniqueItems`) is refused where schemas are compiled: serve/engines/grammar.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from serve.api.openai_parameters import invalid

ONE = ("items", "additionalItems", "additionalProperties")
SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose values are schemas, lists of schemas, and schemas by name."""
FOLLOWED = frozenset(
    {*ONE, *SEVERAL, *NAMED, "type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems"}
    | {"maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"}
    | {"pattern", "format"}
)
REFUSED_LATER = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"}
    | {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
    | {"$dynamicRef", "$recursiveRef"}
)
NOTES = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"$id", "id", "$anchor", "discriminator", "externalDocs"}
)
"""What describes a value and forbids none."""
DRAFTS = ("draft-04", "draft-06", "draft-07", "2019-09", "2020-12")
SINCE = {
    **dict.fromkeys(("const", "contains", "propertyNames"), "draft-06"),
    **dict.fromkeys(("if", "then", "else"), "draft-07"),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "minContains", "maxContains"), "2019-09"),
    **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), "2019-09"),
    **dict.fromkeys(("prefixItems", "$dynamicRef"), "2020-12"),
}
"""Keywords → the first draft that has them. Without `$schema` a schema is of the newest."""


def check(schema: Mapping[str, Any], param: str) -> None:
    """Raise ApiError (400) for a keyword that would not be followed.

    Args:
        param: where the schema is in the request: `response_format.json_schema.schema`.
    """
    draft = _draft(schema.get("$schema"))
    for place, keyword, value in _keywords(schema, param):
        at = f"{place}.{keyword}"
        if keyword == "$schema":
            if place != param or not isinstance(value, str):
                raise invalid(at, "is followed as text at the schema's root alone")
        elif draft is not None and DRAFTS.index(draft) < DRAFTS.index(SINCE.get(keyword, draft)):
            raise invalid(at, f"is no keyword of {draft}, which $schema names: it would not be followed")
        elif not _is_known(keyword, value):
            raise invalid(at, _hint(keyword))


def _is_known(keyword: str, value: Any) -> bool:
    if keyword == "nullable":  # OpenAPI's
        return value is False
    is_note = keyword in NOTES or (keyword.startswith("x-") and keyword != "x-guidance")
    return is_note or keyword in FOLLOWED or keyword in REFUSED_LATER


def _hint(keyword: str) -> str:
    if keyword == "nullable":
        return 'is not followed here; write "type": ["string", "null"]'
    close = difflib.get_close_matches(keyword, FOLLOWED, 1)
    return f"is no keyword that is followed here; {f'did you mean {close[0]}?' if close else 'leave it out'}"


def _draft(said: Any) -> str | None:
    return next((draft for draft in DRAFTS if draft in said), None) if isinstance(said, str) else None


def _keywords(schema: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the keywords of a schema and of those inside it, with the place that they stand in and their values."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        yield place, keyword, value
        at = f"{place}.{keyword}"
        if keyword in NAMED and isinstance(value, Mapping):
            for name, each in value.items():
                yield from _keywords(each, f"{at}.{name[:60]}")
        elif keyword in SEVERAL and isinstance(value, list):
            for number, each in enumerate(value):
                yield from _keywords(each, f"{at}[{number}]")
        elif keyword in ONE:
            yield from _keywords(value, at)
