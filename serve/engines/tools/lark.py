"""A grammar that answers have to follow so that their calls are calls: of the functions there are, with arguments that
their schemas allow. In llguidance's Lark; arguments are JSON schemas as they are, each a rule of its own.

What a function's schema asks beyond what llguidance can enforce is left out for functions that are not `strict`, as
OpenAI's own calls of them are a best effort.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.engines.tools.formats import Format
from serve.wire import Tools

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"
"""Between JSON's tokens: models write arguments on one line, or indent them a little."""
ANY_TEXT = r"/(.|\n)*/"
NO_OBJECT = r"/[^{\[ \t\r\n](.|\n)*/"
"""Text that cannot be taken for a call in a format without markers."""


def grammar(
    form: Format, tools: Tools, parallel: bool, tokens: Mapping[str, int], schema: str | None = None
) -> str | None:
    """Return the grammar of an answer; None where anything goes.

    Args:
        parallel: whether an answer may have several calls.
        tokens: ids of the format's markers that are tokens of their own.
        schema: what the answer has to follow, as JSON, where it is no call.

    Raises:
        ValueError: a text that follows the schema could be taken for a call.
    """
    free = not tools.required
    if free and not tools.strict and schema is None:
        return None
    if free and schema is not None and not form.needs_opening:
        raise ValueError("cannot be told from a call in this model's format; set tool_choice to none or required")
    rules = [f"start: {'text | ' if free and schema else ''}{'TEXT | TEXT? ' if free and not schema else ''}calls"]
    if free:
        rules.append(_text(form, tokens, schema))
    called = [f for f in tools.functions if tools.named in (None, f["name"])]
    rules += _calls(form, parallel, tokens)
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(called))))
    for at, function in enumerate(called):
        rules += _call(form, at, function, function["name"] in tools.strict, tools.required)
    return "\n".join(rules)


def _text(form: Format, tokens: Mapping[str, int], schema: str | None) -> str:
    if schema is not None:
        return f"text: %json {json.dumps(_bounded(json.loads(schema)))}"
    if not form.needs_opening:
        return f"TEXT: {NO_OBJECT}"
    assert form.opening is not None
    if form.opening in tokens:  # no text has that token
        return f"TEXT: {ANY_TEXT}"
    return f"TEXT: {ANY_TEXT} & ~/(.|\\n)*{_escaped(form.opening)}(.|\\n)*/"


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "[](){}|.*+?^$/\\" else char for char in text)


def _calls(form: Format, parallel: bool, tokens: Mapping[str, int]) -> list[str]:
    def marker(text: str | None) -> str:
        return "" if text is None else f"<[{tokens[text]}]>" if text in tokens else json.dumps(text)

    pad = json.dumps(form.padding) if form.padding else ""
    more = f" ({json.dumps(form.between)} one)*" if parallel else ""
    opening = marker(form.opening) if form.needs_opening else ""
    if form.listed:
        return [f'calls: {opening} "[" one{more} "]"', "one: call"]
    return [f"calls: one{more}", f"one: {opening} {pad} call {pad} {marker(form.closing)}"]


def _call(form: Format, at: int, function: Mapping[str, Any], strict: bool, required: bool) -> list[str]:
    head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
    schema = function["parameters"] if strict or required else {"type": "object"}
    return [
        f'call_{at}: {json.dumps(head)} arguments_{at} "}}"',
        f"arguments_{at}: %json {json.dumps(_bounded(schema, lenient=not strict))}",
    ]


def _bounded(schema: dict[str, Any], lenient: bool = False) -> dict[str, Any]:
    """Bound the blanks: a model may prefer them to an answer."""
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient}}
