"""The shapes in which people bring conversations, read into one: a list of `{"role", "content"}` messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.tasks import TaskError

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# A plain ChatML template, given to tokenizers that bring none.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_conversation(example: Mapping[str, Any]) -> bool:
    """Tell a conversation (in any known shape) from plain text."""
    keys = example.keys()
    return (
        bool({"messages", "conversations"} & keys)
        or {"prompt", "completion"} <= keys
        or {
            "instruction",
            "output",
        }
        <= keys
    )


def messages_of(example: Mapping[str, Any]) -> list[dict[str, str]]:
    """Read `messages`, ShareGPT `conversations`, `prompt`/`completion` or Alpaca `instruction`/`input`/`output`.

    Raises:
        TaskError: another shape, an unknown role, or no assistant message to learn from.
    """
    if "messages" in example:
        messages = _read(example["messages"], "messages")
    elif "conversations" in example:
        turns = [_message(m, "from", "value") for m in _turns(example["conversations"], "conversations")]
        messages = _system(example) + [{**m, "role": _sharegpt_role(m["role"])} for m in turns]
    elif "completion" in example:
        messages = _prompt_messages(example["prompt"]) + _answer_messages(example["completion"])
    elif "instruction" in example and "output" in example:
        asked = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
        messages = [*_system(example), _user(asked), _assistant(example["output"])]
    else:
        raise TaskError(
            f"an example with the columns {sorted(example)} is no conversation; expected `messages`, `conversations`, "
            "`prompt` and `completion`, or `instruction` and `output`"
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise TaskError("a conversation without an assistant message has no answer to learn from")
    return messages


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation by the tokenizer's chat template, and the spans of characters to learn.

    A span begins after what the template puts before an answer, and ends after what it puts behind it (so the
    end-of-turn token is learned too). It is found by rendering prefixes, so it works for any template that renders
    a conversation's beginning as the beginning of the conversation.

    Raises:
        TaskError: the template rewrites earlier messages, so answers cannot be located.
    """
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (whole.startswith(through) and through.startswith(before)):
            raise TaskError("the tokenizer's chat template rewrites earlier messages, so the answers cannot be located")
        spans.append((len(before), len(re.sub(r"\n$", "", through))))
    return whole, spans


def _turns(turns: Any, column: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise TaskError(f"column {column!r} holds {type(turns).__name__} instead of a list of messages")
    return turns


def _read(turns: Any, column: str) -> list[dict[str, str]]:
    return [_message(m, "role", "content") for m in _turns(turns, column)]


def _message(message: Mapping[str, Any], role: str, content: str) -> dict[str, str]:
    try:
        return {"role": str(message[role]), "content": str(message[content])}
    except (KeyError, TypeError) as error:
        raise TaskError(f"a message needs {role!r} and {content!r}; this one is {message!r:.200}") from error


def _sharegpt_role(role: str) -> str:
    if role not in SHAREGPT_ROLES:
        raise TaskError(f"unknown role {role!r} in `conversations`; known: {', '.join(SHAREGPT_ROLES)}")
    return SHAREGPT_ROLES[role]


def _system(example: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "system", "content": str(example["system"])}] if example.get("system") else []


def _user(content: Any) -> dict[str, str]:
    return {"role": "user", "content": str(content)}


def _assistant(content: Any) -> dict[str, str]:
    return {"role": "assistant", "content": str(content)}


def _prompt_messages(prompt: Any) -> list[dict[str, str]]:
    return [_user(prompt)] if isinstance(prompt, str) else _read(prompt, "prompt")


def _answer_messages(answer: Any) -> list[dict[str, str]]:
    return [_assistant(answer)] if isinstance(answer, str) else _read(answer, "completion")
