"""Texts as OpenAI's clients send them: one, several, one as token ids, or several so."""

from __future__ import annotations

from typing import Any

from serve.api.body import ApiError, shown

FORMS = "must be a string, a list of strings, a list of token ids, or a list of such lists, no list empty"


def texts(given: Any, param: str) -> list[str | tuple[int, ...]]:
    """Return the texts of a parameter. Raises ApiError (400) that names the item at fault."""
    if isinstance(given, str):
        return [given]
    try:
        if not isinstance(given, list) or not given:
            raise _Wrong(param, FORMS, given)
        if _is_number(given[0]):
            return [_token_ids(given, param)]
        return [_text(each, f"{param}[{at}]", type(given[0])) for at, each in enumerate(given)]
    except _Wrong as wrong:
        raise ApiError(400, str(wrong), code="invalid_value", param=param) from None


class _Wrong(ValueError):
    """A place that holds something else than it must."""

    def __init__(self, place: str, wanted: str, given: Any) -> None:
        super().__init__(f"{place}: {wanted} (given: {shown(given)})")


def _text(given: Any, place: str, kind: type) -> str | tuple[int, ...]:
    """Return one of several texts, which must be of the kind that the first is."""
    if isinstance(given, str) and kind is str:
        return given
    if isinstance(given, list) and kind is list:
        return _token_ids(given, place)
    if kind not in (str, list):
        raise _Wrong(place, "must be a string, a token id or a list of token ids", given)
    raise _Wrong(place, f"must be {'a string' if kind is str else 'a list of token ids'}, as the first is", given)


def _token_ids(given: list[Any], place: str) -> tuple[int, ...]:
    if not given:
        raise _Wrong(place, "must not be empty", given)
    for at, each in enumerate(given):
        if type(each) is not int or each < 0:
            raise _Wrong(f"{place}[{at}]", "must be a token id, a whole number from 0", each)
    return tuple(given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
