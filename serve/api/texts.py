"""Texts as OpenAI's clients send them: one, several, one as token ids, or several so."""

from __future__ import annotations

from typing import Any

from serve.api.body import ApiError, shown


def texts(given: Any, param: str) -> list[str | tuple[int, ...]]:
    """Return the texts of a parameter. Raises ApiError (400) where it has another shape."""
    if isinstance(given, str):
        return [given]
    if _is_token_ids(given):
        return [tuple(given)]
    if isinstance(given, list) and given:
        if all(isinstance(part, str) for part in given):
            return list(given)
        if all(_is_token_ids(part) for part in given):
            return [tuple(part) for part in given]
    wanted = "a string, a list of strings, a list of token ids, or a list of such lists, no list empty"
    raise ApiError(400, f"{param} must be {wanted} (given: {shown(given)})", code="invalid_value", param=param)


def _is_token_ids(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value)
