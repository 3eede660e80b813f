"""What pydantic finds wrong with a spec → sentences with the line, the key and the value, in the words of the file."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.redact import redacted

Location = tuple[str | int, ...]

TAKES = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number", "string_type": "text", "bool_type": "true or false",
    "bool_parsing": "true or false", "list_type": "a list", "tuple_type": "a list",
    "dict_type": "a mapping of keys to values", "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values", "model_attributes_type": "a mapping of keys to values",
    "none_required": "nothing", "string_pattern_mismatch": "text that is not empty",
}  # fmt: skip
"""What a key takes, by the type of pydantic's error."""
LONGEST = 80
"""Characters of a value that a message shows."""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    lines: Mapping[Location, int],
    name: str,
) -> str:
    """Return one line for each mistake, in the order of the file.

    Args:
        model: what the spec was to be.
        values: the spec as it was given.
        lines: the line of each key, 0 for what `--set` gave.
        name: the file.
    """
    found: dict[Location, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_in_the_file(tuple(detail["loc"]), detail["type"], values), []).append(detail)
    # Where a key may be of several kinds, the complaint that goes deepest is about the kind that was meant.
    deeper = {other[:end] for other in found for end in range(len(other))}
    told = [at for at in found if at not in deeper or not all(map(_is_of_kind, found[at]))]
    told.sort(key=lambda at: _line(at, lines))
    return "\n".join(line for at in told for line in _sentences(at, found[at], model, lines, name))


def _sentences(
    at: Location, details: Sequence[Any], model: type[BaseModel], lines: Mapping[Location, int], name: str
) -> list[str]:
    """Say what is wrong at one place: all of it, but of a key that may be of several kinds only one thing."""
    by_kind = [detail for detail in details if _is_of_kind(detail)]
    others = [detail for detail in details if not _is_of_kind(detail)]
    if others:
        return list(dict.fromkeys(_explain_one(at, detail, model, lines, name) for detail in others))
    if len(by_kind) == 1 and by_kind[0]["type"] == "literal_error":
        return [_explain_one(at, by_kind[0], model, lines, name)]
    takes = " or ".join(dict.fromkeys(_takes(detail) for detail in by_kind))
    return [_explain_one(at, {**by_kind[0], "msg": f"takes {takes}"}, model, lines, name)]


def _is_of_kind(detail: Any) -> bool:
    """Say whether the complaint is that the value is not of the kind that the key takes."""
    return detail["type"] in TAKES or detail["type"] == "literal_error"


def _takes(detail: Any) -> str:
    return TAKES.get(detail["type"]) or str(detail["ctx"]["expected"])


def _explain_one(at: Location, detail: Any, model: type[BaseModel], lines: Mapping[Location, int], name: str) -> str:
    section = ".".join(map(str, at[:-1])) or "the spec"
    place = where(at, lines, name)
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        known = detail.get("ctx", {}).get("known") or _known_keys(model, at[:-1])
        return (
            f"{place}: unknown key `{at[-1] if at else detail['input']}` in {section}{_suggestion(str(at[-1]), known)}"
        )
    if detail["type"] == "missing":
        return f"{place}: `{'.'.join(map(str, at))}` is missing"
    message = (
        "takes what is not empty" if detail["type"] == "too_short" else detail["msg"].removeprefix("Value error, ")
    )
    if not at:
        return f"{place}: {message}"
    given = detail.get("input")
    named = next((part for part in reversed(at) if isinstance(part, str)), "")  # of a list's item: the list's key
    shown = "" if isinstance(given, dict | list | BaseModel) else f" (given: {_short(redacted(given, named))})"
    close = _suggestion(str(given), detail["ctx"]["known"]) if detail["type"] == "unknown_word" else ""
    return f"{place}: `{'.'.join(map(str, at))}`: {message}{shown}{close}"


def _short(value: Any) -> str:
    if value is None:
        return "nothing; leave the key out for its default"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def where(at: Location, lines: Mapping[Location, int], name: str) -> str:
    """Return the file and line of a key, or of the closest one above it; or that `--set` gave it."""
    for end in range(len(at), 0, -1):
        line = lines.get(at[:end])
        if line is not None:
            return f"{name}:{line}" if line else f"--set {'.'.join(map(str, at[:end]))}"
    return name


def _line(at: Location, lines: Mapping[Location, int]) -> int:
    return next((lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in lines), 0)


def _in_the_file(location: Location, kind: str, values: Any) -> Location:
    """Drop the parts that pydantic adds for the members of a union: they are no keys of the file."""
    real: list[str | int] = []
    for index, part in enumerate(location):
        if _holds(values, part):
            values = values[part]
        elif not (index == len(location) - 1 and kind == "missing"):
            continue
        real.append(part)
    return tuple(real)


def _holds(values: Any, part: str | int) -> bool:
    if isinstance(values, list | tuple):
        return isinstance(part, int) and 0 <= part < len(values)
    return isinstance(values, Mapping) and part in values


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or key for key, field in model.model_fields.items()]


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    models = [model]
    for part in location:
        models = _children(models, part)
    return sorted({key for candidate in models for key in _keys(candidate)})


def _children(models: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]]:
    """The models that the value under key `part` may be."""
    found: list[type[BaseModel]] = []
    for model in models:
        for key, field in model.model_fields.items():
            if part in (key, field.alias):
                found += _models_in(field.annotation)
    if not found and not any(part in _keys(model) for model in models):
        return models  # an entry of a mapping or a list: its key is the user's own
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, tuple, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known keys: {', '.join(known)}" if known else ""
