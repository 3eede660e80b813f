"""What a chat template is asked, in training and in serving: how it takes the arguments of calls, what it leaves out.

A template answers only by what it renders. So it is given messages with a change: a text that stays the same has not
used what was changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages], str]
"""Renders messages; raises UserError for what the template refuses."""


def in_its_form(render: Render, messages: Messages) -> tuple[list[dict[str, Any]], str]:
    """Return the messages with the arguments of calls as the template takes them, and their text.

    Most templates write arguments as JSON and want mappings. One that wants JSON fails on a mapping, or writes it as
    Python does.

    Args:
        messages: with arguments as mappings or as their JSON.

    Raises:
        UserError: the template refuses the messages, in either form.
    """
    as_mappings = [_with_arguments(message, _mapping) for message in messages]
    written = [str(call["function"]["arguments"]) for each in as_mappings for call in each.get("tool_calls", ())]
    if not written:
        return as_mappings, render(as_mappings)
    as_json = [_with_arguments(message, _json) for message in messages]
    try:
        text = render(as_mappings)
    except UserError as refused:
        try:
            return as_json, render(as_json)
        except UserError:
            raise refused from None  # it is about something else
    if any(argument != "{}" and argument in text for argument in written):
        return as_json, render(as_json)
    return as_mappings, text


def is_same(render: Render, messages: Messages, text: str) -> bool:
    """Say whether other messages give the same text."""
    try:
        return render(messages) == text
    except UserError:  # it misses what was taken away
        return False


def unshown(render: Render, messages: Messages, text: str) -> list[int]:
    """Return the messages whose content the template leaves out of their text.

    Looking for the content in the text does not say it: "as" is in "assistant". So all are marked at once, and what
    comes without its mark is asked about alone.
    """
    marks = [f"\ue000{at}\ue001" for at in range(len(messages))]
    changed = [{**each, "content": f"{each['content']}{mark}"} for each, mark in zip(messages, marks, strict=True)]
    try:
        marked = render(changed).replace("\\ue000", "\ue000").replace("\\ue001", "\ue001")  # as JSON, with escapes
    except UserError:
        marked = ""
    doubted = [at for at, mark in enumerate(marks) if messages[at]["content"].strip() and mark not in marked]
    return [at for at in doubted if is_same(render, [*messages[:at], changed[at], *messages[at + 1 :]], text)]


def _with_arguments(message: Mapping[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    functions = [call["function"] for call in message["tool_calls"]]
    told = [{**function, "arguments": form(function["arguments"])} for function in functions]
    calls = [{**call, "function": function} for call, function in zip(message["tool_calls"], told, strict=True)]
    return {**message, "tool_calls": calls}


def _mapping(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
