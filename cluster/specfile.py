"""One YAML file → one validated model: overrides, line numbers, did-you-mean.

Both halves read their specs through here (`JobSpec`, `ServeSpec`), so a mistake reads the same everywhere.
Precedence: defaults < file < `--set`, left to right. A mapping is merged key by key; a list is replaced.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import UserError
from cluster.mistakes import Location, explain, where

MAX_VALUES, MAX_DEPTH = 100_000, 64
"""Of a spec with its aliases written out: a few lines of them can stand for more than fits in memory."""

Model = TypeVar("Model", bound=BaseModel)


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
    if wrong := [
        sentence for at, what in _not_plain(values, ()) for sentence in (f"{where(at, lines, name)}: {what}",)
    ]:
        raise UserError("\n".join(wrong))
    try:
        return model.model_validate(values, context={"folder": folder, "overridden": overridden})
    except ValidationError as error:
        raise UserError(explain(error, model, values, lines, name)) from None


def place(path: Path, key: str, overrides: typing.Sequence[str] = ()) -> str:
    """Return where the spec at `path` gives a key, by its dotted path: file and line, or that `--set` did."""
    at: Location = tuple(key.split("."))
    _, lines = parse(path.read_text(encoding="utf-8"), str(path))
    given = {location: 0 for location in map(_override_location, overrides)}
    return where(at, {**lines, **given}, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """Return the mapping in `text` and the line (from 1) of each key path in it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except ValueError as error:  # a date or a number that cannot be
        raise UserError(f"{name}: not valid YAML: {error}") from error
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


def _not_plain(value: Any, at: Location) -> Iterator[tuple[Location, str]]:
    """Yield what YAML can hold and JSON cannot, with its place: pydantic would turn some of it into text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _not_plain(inner, (*at, key))
            else:
                yield at, f"key {key!r} in {'.'.join(map(str, at)) or 'the spec'} is no text; put it in quotes"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_plain(inner, (*at, index))
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield at, f"`{'.'.join(map(str, at))}`: half a character (a lone surrogate) is no text (given: {value!r})"
    elif isinstance(value, int) and abs(value) >= 2**63 and not isinstance(value, bool):
        yield at, f"`{'.'.join(map(str, at))}`: takes a smaller number"
    elif value is not None and not isinstance(value, bool | int | float):
        kind = type(value).__name__
        yield at, f"`{'.'.join(map(str, at))}`: YAML reads this as a {kind} ({value}); put it in quotes if it is text"


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
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"--set {override[:200]!r}: the value is not valid YAML: {reason}") from error
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents, 1):
        inner = values.get(parent)
        if inner is not None and not isinstance(inner, dict):
            above = ".".join(parents[:depth])
            raise UserError(f"--set {override!r}: `{above}` is {inner!r}, which this would drop; set `{above}` whole")
        values[parent] = {} if inner is None else inner
        values = values[parent]
    values[last] = value


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
