"""One YAML file → one validated model: overrides, line numbers, did-you-mean.

Both halves read their specs through here (`JobSpec`, `ServeSpec`), so a mistake reads the same everywhere.
Precedence: defaults < file < `--set`, left to right. A mapping is merged key by key; a list is replaced.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import UserError

MAX_VALUES, MAX_DEPTH = 100_000, 64
"""Of a spec with its aliases written out: a few lines of them can stand for more than fits in memory."""

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number (as in YAML 1.2) and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load(path: Path, model: type[Model], overrides: typing.Sequence[str] = ()) -> Model:
    """Read and validate the spec at `path`, with `key.path=value` overrides applied.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value is wrong; every mistake is listed
            with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the spec {path}: {_reason(error)}") from error
    return loads(text, model, overrides, name=str(path), folder=path.absolute().parent)


def loads(
    text: str,
    model: type[Model],
    overrides: typing.Sequence[str] = (),
    name: str = "spec",
    folder: Path | None = None,
) -> Model:
    """Like `load`, from a string; `name` stands for the file in messages, `folder` for where it lies.

    A model's validators find `folder` and the locations that overrides gave (`overridden`) in pydantic's context. A
    section among its `short_forms` may be written as the value of one key: `task: x` for `task: {name: x}`.
    """
    values, lines = parse(text, name)
    _write_out(values, model)
    overridden = [_override_location(override) for override in overrides]
    for override in overrides:
        _apply(values, override)
        _write_out(values, model)
    lines = {**lines, **dict.fromkeys(overridden, 0)}
    try:
        return model.model_validate(values, context={"folder": folder, "overridden": overridden})
    except ValidationError as error:
        raise UserError(_explain(error, model, lines, name)) from None


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """Return the mapping in `text` and the line (from 1) of each key path in it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: a spec is a mapping of keys to values, this is a {type(values).__name__}")
    lines: dict[Location, int] = {}
    _collect_lines(node, (), lines, name)
    return values, lines


def _collect_lines(node: yaml.Node | None, location: Location, lines: dict[Location, int], name: str) -> None:
    if len(lines) > MAX_VALUES or len(location) > MAX_DEPTH:
        raise UserError(
            f"{name}: more than {MAX_VALUES:,} values or {MAX_DEPTH} levels: aliases (*name) repeat too much"
        )
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*location, key.value)
            if child in lines:
                raise UserError(f"{name}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
            lines[child] = key.start_mark.line + 1
            _collect_lines(value, child, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item = (*location, index)
            lines[item] = value.start_mark.line + 1
            _collect_lines(value, item, lines, name)


def _override_location(override: str) -> Location:
    return tuple(override.partition("=")[0].split("."))


def _write_out(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Write sections that were given in short out, so that an override may add to them. "*" stands for any key."""
    for path, key in getattr(model, "short_forms", {}).items():
        *parents, last = path.split(".")
        places: list[Any] = [values]
        for parent in parents:
            places = [
                inner
                for place in places
                if isinstance(place, dict)
                for inner in (place.values() if parent == "*" else [place.get(parent)])
            ]
        for place in places:
            if isinstance(place, dict) and isinstance(place.get(last), str):
                place[last] = {key: place[last]}


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set {override!r}: write it as key.path=value, for instance --set training.steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents, 1):
        inner = values.get(parent)
        if inner is not None and not isinstance(inner, dict):
            above = ".".join(parents[:depth])
            raise UserError(f"--set {override!r}: `{above}` is {inner!r}, which this would drop; set `{above}` whole")
        values[parent] = {} if inner is None else inner
        values = values[parent]
    values[last] = value


def _explain(error: ValidationError, model: type[BaseModel], lines: dict[Location, int], name: str) -> str:
    details = [(_real_location(tuple(detail["loc"]), model), detail) for detail in error.errors(include_url=False)]
    # Where a key may be of several kinds, the complaint that goes deepest is about the kind that was meant.
    told = [
        (location, detail)
        for location, detail in details
        if not any(len(other) > len(location) and other[: len(location)] == location for other, _ in details)
    ]
    told.sort(key=lambda item: lines.get(item[0], 0))
    return "\n".join(_explain_one(location, detail, model, lines, name) for location, detail in told)


def _explain_one(location: Location, detail: Any, model: type[BaseModel], lines: dict[Location, int], name: str) -> str:
    section = ".".join(map(str, location[:-1])) or "the spec"
    where = _where(location, lines, name)
    if detail["type"] == "extra_forbidden":
        known = detail.get("ctx", {}).get("known") or _known_keys(model, location[:-1])
        return f"{where}: unknown key `{location[-1]}` in {section}{_suggestion(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return f"{where}: `{'.'.join(map(str, location))}` is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if not location:
        return f"{where}: {message}"
    given = detail.get("input")
    shown = "" if isinstance(given, dict | list | BaseModel) else f" (given: {given!r})"
    close = _suggestion(str(given), detail["ctx"]["known"]) if detail["type"] == "unknown_word" else ""
    return f"{where}: `{'.'.join(map(str, location))}`: {message}{shown}{close}"


def _where(location: Location, lines: dict[Location, int], name: str) -> str:
    for end in range(len(location), 0, -1):
        line = lines.get(location[:end])
        if line is not None:
            return f"{name}:{line}" if line else f"--set {'.'.join(map(str, location[:end]))}"
    return name


def _real_location(location: Location, model: type[BaseModel]) -> Location:
    """Drop the parts pydantic adds for members of a union: they are no keys of the file."""
    real: list[str | int] = []
    models: list[type[BaseModel]] = [model]
    for part in location:
        keys = {key for candidate in models for key in _keys(candidate)}
        is_tag = isinstance(part, str) and part not in keys and any(part == c.__name__ for c in models)
        if is_tag or (isinstance(part, str) and part in _TYPE_TAGS and part not in keys):
            continue
        real.append(part)
        models = _children(models, part) or models
    return tuple(real)


_TYPE_TAGS = {"int", "float", "str", "bool", "constrained-str", "list[str]", "none", "dict[str,any]"}


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


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
