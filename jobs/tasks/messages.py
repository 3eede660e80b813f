"""One message of a conversation, read strictly: what would change the result is kept for the template, or refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.unique_keys import KeyTwice, unique
from jobs.tasks import TaskError

Message = dict[str, Any]
"""`role` and `content` (a text), and where they are given `tool_calls`, `tool_call_id`, `name`, `reasoning_content`,
`thinking` or `reasoning`; `learned: False` where an answer is context only."""

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
FLAGS = ("weight", "train")
LEARNED = "learned"

_NEUTRAL = ("id", "cache_control", "timestamp", "created_at")
"""Keys that say nothing to a model."""
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}


def read_message(given: Any, role: str = "role", content: str = "content") -> Message:
    """Read a message; its role is not looked at beyond its type.

    Args:
        given: a mapping.
        role: the key of the role.
        content: the key of the text.

    Raises:
        TaskError: a key is missing, or holds what is neither honoured nor without effect.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get(role), str):
        raise TaskError(f"a message needs {role!r} and {content!r}; this one is {given!r:.200}")
    rest = {key: value for key, value in given.items() if key not in (role, content) and not is_nothing(value)}
    honoured = ("tool_calls", "name", "tool_call_id", *REASONING, *FLAGS, *_NEUTRAL)
    if content not in given and is_nothing(rest.get("tool_calls")):
        raise TaskError(f"a message needs {role!r} and {content!r}; this one is {given!r:.200}")
    unknown = sorted(str(key) for key in rest.keys() - set(honoured))
    if unknown:
        raise TaskError(
            f"a message has {', '.join(map(repr, unknown))}, which is not honoured; take it out of the data if it "
            "should have no effect"
        )
    message: Message = {"role": given[role]}
    if "tool_calls" in rest:
        message["tool_calls"] = _tool_calls(rest.pop("tool_calls"))
    message["content"] = _content(given.get(content), content, "tool_calls" in message)
    for key in ("name", "tool_call_id", *REASONING):
        if key in rest:
            message[key] = text_of(rest.pop(key), key)
    flags = [_flag(key, given[key]) for key in FLAGS if given.get(key) is not None]
    if flags:
        message[LEARNED] = all(flags)
    return message


def check_role(message: Message) -> Message:
    """Return the message if its role is one that chat templates know.

    Raises:
        TaskError: it is not, or it carries or asks for what only an assistant's can.
    """
    role = message["role"]
    if role not in ROLES:
        meant = role.strip().lower()
        meant = meant if meant in ROLES else _OTHER_ROLES.get(meant)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise TaskError(f"unknown role {role!r}; known: {', '.join(ROLES)}{hint}")
    for key in ("tool_calls", *REASONING):
        if key in message and role != "assistant":
            raise TaskError(f"a message of role {role!r} has {key!r}, which only an assistant's can have")
    if role != "assistant" and message.get(LEARNED):
        raise TaskError(
            f"a message of role {role!r} has a weight or train that asks to learn it, and only answers are learned; "
            "take it out"
        )
    return {key: value for key, value in message.items() if key != LEARNED or not value}


def is_nothing(value: Any) -> bool:
    """Tell whether a value says nothing: null, an empty text, list or mapping."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: it is empty, or all white space and characters that take no place."""
    return not text.strip() or all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def text_of(value: Any, where: str) -> str:
    """Return a text as it is.

    Raises:
        TaskError: it is something else, or has half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise TaskError(f"{where!r} holds {_named(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TaskError(f"{where!r} holds half of a surrogate pair, {value[error.start]!a}") from None
    return value


def _named(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({value!r:.60})"


def _content(value: Any, where: str, calls: bool) -> str:
    if value is None and calls:
        return ""
    if isinstance(value, list | tuple):
        return "".join(_part(part, where) for part in value)
    return text_of(value, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return text_of(part, where)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        named = f"a part of type {kind!r}" if kind is not None else f"{type(part).__name__} ({part!r:.60})"
        raise TaskError(f"{where!r} holds {named}; only text parts are read: {{'type': 'text', 'text': …}}")
    others = sorted(key for key, value in part.items() if key not in ("type", "text", *_NEUTRAL))
    others = [key for key in others if not is_nothing(part[key])]
    if others:
        raise TaskError(f"a text part in {where!r} has {others[0]!r}, which is not honoured")
    return text_of(part.get("text"), where)


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise TaskError(f"{key!r} of a message is {value!r:.60}; it can be 0 or 1: whether the answer is learned")


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    given = from_json(value, "tool_calls")
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TaskError(f"'tool_calls' holds {_named(value)} instead of a list of calls")
    return [tool_call(call) for call in given]


def tool_call(given: Any) -> dict[str, Any]:
    """Read a call: OpenAI's, or the function's name and arguments alone.

    Raises:
        TaskError: it is no call of a function.
    """
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TaskError(f"a call of a tool needs a function with a name; this one is {given!r:.120}")
    if given.get("type") not in (None, "function"):
        raise TaskError(f"a call of type {given['type']!r} is not honoured; only functions can be called")
    arguments = function.get("arguments")
    arguments = {} if is_nothing(arguments) else arguments
    if not isinstance(arguments, Mapping | str):
        raise TaskError(f"the arguments of {function['name']!r} are {_named(arguments)}, not a mapping")
    if isinstance(arguments, str):
        read = from_json(arguments, f"arguments of {function['name']}")
        if not isinstance(read, Mapping):
            raise TaskError(f"the arguments of {function['name']!r} are {arguments!r:.60}, not a mapping in JSON")
    check_json(arguments, f"the arguments of {function['name']!r}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**call, **({"id": text_of(given["id"], "id")} if given.get("id") is not None else {})}


def check_json(value: Any, where: str) -> None:
    """Refuse a value that JSON cannot say: a template would write it in some way of its own.

    Raises:
        TaskError: it holds NaN, an infinity, a date, bytes.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskError(f"{where} are no JSON: {error}") from None


def from_json(value: Any, where: str) -> Any:
    """Return what a text of JSON stands for; anything else as it is.

    Raises:
        TaskError: the text is no JSON, or one of its objects has a key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique, parse_constant=_no_number)
    except KeyTwice as error:
        raise TaskError(f"{where!r} holds JSON in which the key {error.key!r} is there twice") from None
    except ValueError as error:
        raise TaskError(f"{where!r} holds a text that is no JSON ({error})") from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")
