"""What a model that generates is asked by a raw example: a text to go on from, or a conversation up to its answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.conversations import conversation_of
from jobs.tasks.examples import ExampleReader
from jobs.tasks.messages import LEARNED, Message, from_json, is_blank, is_nothing

_ANSWERS = {"prompt": "completion", "instruction": "output"}
"""The column of what is asked → that of the answer, which need not be there."""
_TURNS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}
"""The column of a conversation → how its turns are written, and who answers."""
_PLACEHOLDER = "answer"


def prompt_of(example: Mapping[str, Any], reader: ExampleReader, named: bool) -> str | tuple[Message, ...]:
    """Return the text of an example, or the messages of its conversation without the answer at its end.

    An answer that the data has is not shown to the model.

    Args:
        named: the task's options name the column of the text.

    Raises:
        TaskError: nothing is asked, it cannot be read, or it calls functions.
    """
    asked = example if named else _with_answer(example)
    if named or not reader.is_conversation(asked):
        text = reader.text(example)
        if is_blank(text):
            raise TaskError(f"column {reader.column!r} is empty: there is nothing to go on from")
        return text
    conversation = conversation_of(asked)
    messages = [{key: value for key, value in m.items() if key != LEARNED} for m in conversation.messages]
    if conversation.tools or any("tool_calls" in message for message in messages):
        raise TaskError("a conversation with tools or calls of functions is not honoured by phase predict")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise TaskError("the conversation asks nothing: it has answers only")
    return tuple(messages)


def _with_answer(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the example with some answer where it lacks one: conversations are read as in training."""
    changed: dict[str, Any] = {}
    for column, (role, content, answers) in _TURNS.items():
        if is_nothing(example.get(column)):
            continue
        turns = from_json(example[column], column)
        if isinstance(turns, Sequence) and not (turns and _answers(turns[-1], role)):
            changed = {column: [*turns, {role: answers, content: _PLACEHOLDER}]}
        return _changed(example, changed)
    for column, answer in _ANSWERS.items():
        if not is_nothing(example.get(column)) and is_nothing(example.get(answer)):
            return _changed(example, {answer: _PLACEHOLDER})
    return example


def _answers(turn: Any, role: str) -> bool:
    return isinstance(turn, Mapping) and turn.get(role, turn.get("role")) in ("assistant", "gpt")


def _changed(example: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of the example that is what the example is: one out of Arrow stays one (column_padding.py)."""
    if not changes:
        return example
    changed = dict(example) if type(example) is dict else copy.copy(example)
    for column, value in changes.items():
        changed[column] = value  # type: ignore[index]
    return changed
