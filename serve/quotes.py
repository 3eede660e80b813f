"""Failures as the log has them, without what an exception quotes of a request: what clients send is never logged."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from serve.wire import EmbedCall, GenerateCall, InferCall

LEAST = 8
"""So many characters in a row that the request has too are taken for a quote; a shorter one may stand."""
MOST_SAID = 2_000
"""Characters of one exception's message that are looked at, and kept."""
MOST_SENT = 1 << 18
"""In a request with more characters nothing is looked for: messages are left out as a whole."""
MASK = "…"
LEFT_OUT = "(what it says may quote the request, and is left out)"
OWN = frozenset({"request_id", "place", "trace"})
"""Fields of a call that are not the client's texts, or are in the log anyway."""


def failure(error: BaseException, call: GenerateCall | InferCall | EmbedCall | None) -> str:
    """Return an exception and those that led to it, as Python prints them, without quotes of the request. Pure.

    Args:
        call: None where nobody knows what was sent: then no message about a value is kept (`about_values`).
    """
    parts: list[str] = []
    for each in _chain(error):
        said = "".join(traceback.format_exception_only(each)).strip()
        if call is not None:
            said = unquoted(said, call)
        elif about_values([each]):
            said = f"{type(each).__qualname__} {LEFT_OUT}"
        parts.append("".join(traceback.format_tb(each.__traceback__)) + said)
    return "\nwhich led to:\n".join(parts)


def unquoted(said: str, call: GenerateCall | InferCall | EmbedCall) -> str:
    """Return what is said with `…` in place of each part that the request has too. Pure."""
    texts = set(_texts([getattr(call, name) for name in vars(call) if name not in OWN]))
    if sum(map(len, texts)) > MOST_SENT:
        return LEFT_OUT
    sent = "\0".join({spelling for text in texts for spelling in _spellings(text)})
    kept, at, said = [], 0, said[:MOST_SAID]
    while at < len(said):
        end = at + LEAST
        if end > len(said) or said[at:end] not in sent:
            kept.append(said[at])
            at += 1
            continue
        while end < len(said) and said[at : end + 1] in sent:
            end += 1
        kept.append(MASK)
        at = end
    return "".join(kept)


def about_values(errors: list[BaseException]) -> bool:
    """Say whether any of them is of a kind that quotes values: pydantic's, of JSON, of a key that is not there."""
    return any(isinstance(each, ValueError | LookupError) for each in errors)


def may_quote(error: BaseException) -> bool:
    """Say whether an exception, or one that led to it, is of a kind that quotes values."""
    return about_values(_chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """Return the exception and what led to it, the first one first."""
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found:
        found.append(each)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return found[::-1]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a request's parts, names in its objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
        yield repr(value)[2:-1]
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            if not isinstance(part, int | float):
                yield from _texts(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _texts(list(vars(value).values()))


def _spellings(text: str) -> tuple[str, ...]:
    """Return how messages write a text: as it is, as Python does, and as JSON does."""
    return text, repr(text)[1:-1], ascii(text)[1:-1], json.dumps(text)[1:-1]
