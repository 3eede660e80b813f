"""JSON schemas that answers must follow: a keyword that nothing here follows is refused, with its place. Pure.

Whoever compiles a schema passes over keywords that it does not know, as JSON Schema has it: a misspelt one, one of
another draft than `$schema` says, one of another dialect. The answer would be checked by nothing, and look as if.
What is known and not followed (`not`, `uniqueItems`) is refused where schemas are compiled: serve/engines/grammar.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

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


MOST_PARTS = 20_000
"""Objects and lists of a schema, and of the values in it."""
MOST_LEVELS = 1000
"""Objects and lists inside each other, in a schema and all that it refers to: a hundred models of pydantic have 500."""
MOST_NAMES = 5000
"""Properties and required names in all, as OpenAI has it."""
MOST_NAMED_BY_PATTERN = 100
MOST_PATTERNS = 10_000
"""Characters of all patterns together; so many take a second."""
MOST_VALUES = 50_000


def check(schema: Mapping[str, Any], param: str) -> None:
    """Raise ApiError (400) for a keyword that would not be followed.

    Args:
        param: where the schema is in the request: `response_format.json_schema.schema`.
    """
    check_size(schema, param)
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


def check_size(schema: Mapping[str, Any], param: str) -> None:
    """Raise ApiError (400) for a schema that would take the one who compiles it too far.

    It is descended into by recursion, references and lists of required names included, where some thousands overflow
    the stack and end the process. Many properties and long patterns take time that grows faster than they do.
    """
    depths: dict[int, int] = {}
    whole = _depth(schema, depths)
    schemas = list(_schemas(schema))
    references = {value for each in schemas if isinstance(value := each.get("$ref"), str)}
    levels = whole + sum(depths.get(id(_at(schema, each)), whole) for each in references)
    counted = {
        "objects and lists": (len(depths), MOST_PARTS),
        "levels, with what it refers to,": (levels, MOST_LEVELS),
        "names of properties": (sum(map(_names, schemas)), MOST_NAMES),
        "patternProperties": (sum(len(_mapping(each, "patternProperties")) for each in schemas), MOST_NAMED_BY_PATTERN),
        "characters of patterns": (sum(map(_pattern_letters, schemas)), MOST_PATTERNS),
        "values of enum": (sum(len(_list(each, "enum")) for each in schemas), MOST_VALUES),
    }
    for what, (count, most) in counted.items():
        if count > most:
            raise invalid(param, f"it has {count} {what} in all; at most {most} are taken")


def _depth(value: Any, depths: dict[int, int]) -> int:
    """Return how many objects and lists are inside each other, and note that of each in `depths`, by its id."""
    if not isinstance(value, dict | list):
        return 0
    inside = value.values() if isinstance(value, dict) else value
    depths[id(value)] = depth = 1 + max((_depth(each, depths) for each in inside), default=0)
    return depth


def _at(schema: Any, reference: str) -> Any:
    """Return what a pointer (`#/$defs/a`) leads to; None where that is nothing, or by a name."""
    for part in unquote(reference).removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdecimal() and int(key[:9]) < len(schema):
            schema = schema[int(key[:9])]
        elif isinstance(schema, dict) and key in schema:
            schema = schema[key]
        else:
            return None
    return schema


def _names(schema: Mapping[str, Any]) -> int:
    return max(len(_mapping(schema, "properties")), len(_list(schema, "required")))


def _pattern_letters(schema: Mapping[str, Any]) -> int:
    texts = (schema.get("pattern"), *_mapping(schema, "patternProperties"))
    return sum(len(text) for text in texts if isinstance(text, str))


def _mapping(schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


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
    for at, each in _placed(schema, place):
        for keyword, value in each.items():
            yield at, keyword, value


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    return (each for _, each in _placed(schema, ""))


def _placed(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a schema and those inside it, with their places."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for keyword, value in schema.items():
        at = f"{place}.{keyword}"
        if keyword in NAMED and isinstance(value, Mapping):
            for name, each in value.items():
                yield from _placed(each, f"{at}.{name[:60]}")
        elif keyword in SEVERAL and isinstance(value, list):
            for number, each in enumerate(value):
                yield from _placed(each, f"{at}[{number}]")
        elif keyword in ONE:
            yield from _placed(value, at)
