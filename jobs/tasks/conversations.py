"""The shapes in which people bring conversations, read into one: messages, and the tools that they may call.

An example's own columns decide its shape. What stands beside a conversation and would change it (a system prompt,
earlier turns, tools) is part of it; what cannot be honoured is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import close
from jobs.tasks.column_padding import without_padding
from jobs.tasks.messages import (
    LEARNED,
    REASONING,
    Message,
    check_json,
    check_role,
    from_json,
    is_blank,
    is_nothing,
    read_message,
    text_of,
    tool_call,
)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""The columns that make a shape, in the order in which they are looked for."""
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
COLUMNS = frozenset(key for shape in _SHAPES for key in shape)
"""Columns that make a conversation, some of them two together."""
_TELLING = COLUMNS | {"chosen", "rejected"}
"""Without any of these an example is no conversation."""
NOT_HONOURED = ("rejected", "chosen", "context", "functions", "documents", "images", "image", "videos", "audio",
                 "audios", "chat_template_kwargs", "chat_template", "weight", "train", "loss_weight", "sample_weight",
                 "loss_mask", "completion_mask", "system_prompt", *REASONING)  # fmt: skip
"""Columns beside a conversation that would change it."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    padded: bool = False
    """Nulls were left out that stood for entries of calls or tools which were not there."""


def is_conversation(example: Mapping[str, Any]) -> bool:
    """Tell a conversation (in any known shape, or half of one) from plain text.

    A column that holds null is not there; one of two that make a conversation is half of it.
    """
    if _TELLING.isdisjoint(example):
        return False
    return _shape(example) is not None or _is_preference(example) or _half(example) is not None


def unused(example: Mapping[str, Any]) -> list[str]:
    """Return the columns beside a conversation that hold something and have no effect."""
    shape = _shape(example) or ()
    beside = ("system", "tools", *(("history",) if len(shape) == 2 else ()))
    used = {*shape, *beside, *(("input",) if shape == ("instruction", "output") else ())}
    return [key for key, value in example.items() if key not in used and not is_nothing(value)]


def messages_of(example: Mapping[str, Any]) -> list[Message]:
    """Return the messages of `conversation_of`."""
    return conversation_of(example).messages


def conversation_of(example: Mapping[str, Any]) -> Conversation:
    """Read `messages`, ShareGPT `conversations`, `prompt`/`completion` or Alpaca `instruction`/`input`/`output`.

    Raises:
        TaskError: another shape, an unknown role, something that is not honoured, or no answer to learn from.
    """
    if _is_preference(example):
        raise TaskError(
            "'chosen' and 'rejected' are a preference, which task.objective dpo, ipo or orpo learns; for this one take "
            "both columns out"
        )
    shape = _shape(example)
    if shape is None and (half := _half(example)) is not None:
        raise TaskError(f"column {half[1]!r} holds null, and with {half[0]!r} it would be a conversation")
    if shape is None:
        raise TaskError(
            f"an example with the columns {sorted(example)} is no conversation; expected `messages`, `conversations`, "
            "`prompt` and `completion`, or `instruction` and `output`"
        )
    _check_beside(example, shape)
    given, example = example, without_padding(example)
    messages = [check_role(message) for message in _READERS[shape[0]](example)]
    messages = with_system(example, messages)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise TaskError("a conversation without an assistant message has no answer to learn from")
    learned = [m for m in answers if is_learned(m)]
    if not learned:
        raise TaskError("all answers of the conversation have weight 0: there is no answer to learn from")
    if any(is_blank(m["content"]) and "tool_calls" not in m for m in learned):
        raise TaskError("an answer is empty: there is nothing to learn from it")
    return Conversation(messages, tools_of(example), example is not given)


def is_learned(message: Message) -> bool:
    """Tell whether a message is an answer to learn."""
    return bool(message["role"] == "assistant" and message.get(LEARNED, True))


def _shape(example: Mapping[str, Any]) -> tuple[str, ...] | None:
    return next((shape for shape in _SHAPES if all(example.get(key) is not None for key in shape)), None)


def _half(example: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return of two columns that make a conversation the one that is there, and the one that holds null."""
    pairs = [shape for shape in _SHAPES if len(shape) == 2 and all(key in example for key in shape)]
    ordered = (sorted(pair, key=lambda key: example[key] is None) for pair in pairs)
    return next(((one, other) for one, other in ordered if example[one] is not None and example[other] is None), None)


def _is_preference(example: Mapping[str, Any]) -> bool:
    return example.get("chosen") is not None and example.get("rejected") is not None


def _check_beside(example: Mapping[str, Any], shape: tuple[str, ...]) -> None:
    if shape == ("messages",) and not is_nothing(example.get("conversations")):
        raise TaskError("an example has both 'messages' and 'conversations'; keep one")
    refused = [key for key in NOT_HONOURED if not is_nothing(example.get(key))]
    if not is_nothing(example.get("history")) and not isinstance(_asked(example, shape), str):
        refused.append("history")
    if not is_nothing(example.get("input")) and shape != ("instruction", "output") and "instruction" in example:
        refused.append("input")
    # Of answers that are not wanted.
    refused += [key for key in ("label", "kto_tag") if key in example and _is_no(example[key])]
    if refused:
        raise TaskError(
            f"column {refused[0]!r} beside a conversation is not honoured; take it out if it should have no effect"
        )


def _is_no(label: Any) -> bool:
    """Tell a label that calls an answer a bad one, as in preference data: false, 0, or their words in a table."""
    return label in (False, 0) if isinstance(label, bool | int | float) else str(label).lower() in ("false", "0")


def _asked(example: Mapping[str, Any], shape: tuple[str, ...]) -> Any:
    """Return the question of the shapes that hold one turn."""
    return example[shape[0]] if len(shape) == 2 else None


def turns_of(turns: Any, column: str) -> Sequence[Any]:
    """Return a list of messages as it is; raise TaskError for anything else."""
    if not isinstance(turns, list | tuple):
        raise TaskError(f"column {column!r} holds {type(turns).__name__} instead of a list of messages")
    return turns


def _messages(example: Mapping[str, Any]) -> list[Message]:
    return [read_message(turn) for turn in turns_of(from_json(example["messages"], "messages"), "messages")]


def _sharegpt(example: Mapping[str, Any]) -> list[Message]:
    turns = turns_of(from_json(example["conversations"], "conversations"), "conversations")
    return [sharegpt_turn(turn) for turn in turns]


def sharegpt_turn(turn: Any) -> Message:
    """Read a message of `from` and `value`, or of `role` and `content`; raise TaskError for another."""
    if isinstance(turn, Mapping) and "from" not in turn and "role" in turn:
        return read_message(turn)
    message = read_message(turn, "from", "value")
    role = message["role"]
    if role not in SHAREGPT_ROLES:
        meant = role.strip().lower()
        hint = f"; did you mean {meant!r}?" if meant in SHAREGPT_ROLES else close(role, SHAREGPT_ROLES)
        raise TaskError(f"unknown role {role!r} in `conversations`; known: {', '.join(SHAREGPT_ROLES)}{hint}")
    if role == "function_call":
        calls = from_json(message["content"], "value of function_call")
        calls = [tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
        message |= {"tool_calls": calls, "content": ""}
    return {**message, "role": SHAREGPT_ROLES[role]}


def _completion(example: Mapping[str, Any]) -> list[Message]:
    """Read prompt and completion: texts, or lists of messages. What the prompt answers itself is context."""
    prompt, answer = example["prompt"], example["completion"]
    before = [*history_of(example), user(prompt, "prompt")] if isinstance(prompt, str) else _read(prompt, "prompt")
    if not isinstance(prompt, str):
        before = [{**m, LEARNED: False} if m["role"] == "assistant" else m for m in before]
    return [*before, *([assistant(answer, "completion")] if isinstance(answer, str) else _read(answer, "completion"))]


def _alpaca(example: Mapping[str, Any]) -> list[Message]:
    return [*instruction_of(example), assistant(example["output"], "output")]


def instruction_of(example: Mapping[str, Any]) -> list[Message]:
    """Return what Alpaca's `history`, `instruction` and `input` ask; raise TaskError for what is no text."""
    given = example.get("input")
    parts = [text_of(example["instruction"], "instruction"), "" if given is None else text_of(given, "input")]
    return [*history_of(example), user("\n\n".join(filter(None, parts)), "instruction")]


_READERS = {"messages": _messages, "conversations": _sharegpt, "prompt": _completion, "instruction": _alpaca}


def history_of(example: Mapping[str, Any]) -> list[Message]:
    """Return the earlier turns that Alpaca's `history` holds: pairs of a question and its answer, or TaskError."""
    history = from_json(example.get("history") or [], "history")
    turns = []
    for pair in turns_of(history, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TaskError(f"'history' holds {pair!r:.80}; expected pairs of a question and its answer")
        turns += [user(pair[0], "history"), assistant(pair[1], "history")]
    return turns


def _read(turns: Any, column: str) -> list[Message]:
    return [read_message(turn) for turn in turns_of(turns, column)]


def with_system(example: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Put what the column `system` says first; raise TaskError where the messages say something else."""
    if is_nothing(example.get("system")):
        return messages
    system = text_of(example["system"], "system")
    there = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    if there and there != [system]:
        raise TaskError("column 'system' says something else than the system message of the conversation; keep one")
    return messages if there else [{"role": "system", "content": system}, *messages]


def tools_of(example: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the column `tools`, a list or its JSON, as OpenAI writes tools; raise TaskError for what is none."""
    given = from_json(example.get("tools") or [], "tools")
    if is_nothing(given):
        return None
    if not isinstance(given, list | tuple) or not all(isinstance(tool, Mapping) for tool in given):
        raise TaskError(f"'tools' holds {type(given).__name__} ({given!r:.60}) instead of a list of tools")
    return [_tool(tool) for tool in given]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TaskError(f"a tool needs a function with a name; this one is {tool!r:.120}")
    if tool.get("type", "function") != "function":
        raise TaskError(f"a tool of type {tool['type']!r} is not honoured; only functions are")
    check_json(function, f"the parts of the tool {function['name']!r}")
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}


def user(content: Any, where: str) -> Message:
    """Return a question; raise TaskError for what is no text."""
    return {"role": "user", "content": _plain(content, where)}


def assistant(content: Any, where: str) -> Message:
    """Return an answer; raise TaskError for what is no text."""
    return {"role": "assistant", "content": _plain(content, where)}


def _plain(content: Any, where: str) -> str:
    """Return a text that is not a list of messages, as a table of a program's own objects holds it."""
    text = text_of(content, where)
    if _WRITTEN_OUT.match(text) and all(re.search(rf"""['"]{key}['"]\s*:""", text) for key in ("role", "content")):
        raise TaskError(f"{where!r} holds messages written out as one text ({text!r:.60}); give them as a list")
    return text
