"""Sentences in place of pydantic's, which name types of its own and of ours. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.api.body import shown

SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not known here",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must be a list of at most {max_length} items",
    "less_than": "is too large",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_pattern_mismatch": "must match {pattern}",
}
"""By pydantic's name of the error; in brackets, what it tells beside."""


def sentence(details: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with a value: pydantic's details of it, one for each kind that it could have been."""
    told = list(dict.fromkeys(_told(detail) for detail in details))
    must = [each.removeprefix("must be ") for each in told if each.startswith("must be ")]
    said = "must be " + " or ".join(must) if must else told[0]
    return said if details[0]["type"] == "missing" else f"{said} (given: {shown(details[0].get('input'))})"


def _told(detail: Mapping[str, Any]) -> str:
    known = SENTENCES.get(detail["type"])
    return known.format_map(detail.get("ctx", {})) if known else str(detail["msg"])
