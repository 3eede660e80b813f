"""The shapes in which people bring preferences, read into one: two conversations that part ways at the last answer.

    prompt, chosen, rejected           texts, or lists of messages; the answers may repeat the prompt before them (TRL)
    chosen, rejected                   lists of messages, or transcripts of "\\n\\nHuman: " and "\\n\\nAssistant: ": the
                                       prompt is what both begin with (TRL's implicit prompts)
    conversations, chosen, rejected    ShareGPT: the prompt's turns, and a turn each
    instruction, chosen, rejected      Alpaca, with `input` and `history`
    question, chosen, rejected         texts

What stands beside them (`system`, `tools`) is part of both; what cannot be honoured is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.column_padding import without_padding
from jobs.tasks.conversations import (
    NOT_HONOURED,
    Conversation,
    assistant,
    history_of,
    instruction_of,
    sharegpt_turn,
    tools_of,
    turns_of,
    user,
    with_system,
)
from jobs.tasks.messages import LEARNED, Message, check_role, from_json, is_blank, is_nothing

ANSWERS = ("chosen", "rejected")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
"""What begins a turn in a transcript, as Anthropic's HH-RLHF writes them."""
_PROMPTS = ("prompt", "conversations", "instruction", "question")


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer that is preferred, and with the other one; in both only the answer is learned."""

    chosen: Conversation
    rejected: Conversation

    @property
    def repeats(self) -> bool:
        """Return whether both answers begin with the text of the question, as where the two were put together."""
        both = [self.chosen.messages, self.rejected.messages]
        at = next((at for at, (one, other) in enumerate(zip(*both, strict=False)) if one != other), 0)
        asked = both[0][at - 1]["content"].strip() if at else ""
        return bool(asked) and all(messages[at]["content"].lstrip().startswith(asked) for messages in both)


def preference_of(example: Mapping[str, Any]) -> Preference:
    """Read an example in one of the shapes above.

    Raises:
        TaskError: another shape, answers that are empty or the same, or something that is not honoured.
    """
    column = _checked(example)
    given, example = example, without_padding(example)
    chosen, rejected = (_answer(example[name], name, alone=column is None) for name in ANSWERS)
    prompt = _prompt(example, column) if column else None
    prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    context = [{**m, LEARNED: False} if m["role"] == "assistant" else m for m in with_system(example, prompt)]
    tools, padded = tools_of(example), example is not given
    if chosen == rejected:
        raise TaskError("'chosen' and 'rejected' are the same answer: there is nothing to prefer")
    made = (_with_answer(context, answer, name) for answer, name in ((chosen, "chosen"), (rejected, "rejected")))
    return Preference(*(Conversation(messages, tools, padded) for messages in made))


def unused(example: Mapping[str, Any]) -> list[str]:
    """Return the columns beside a preference that hold something and have no effect."""
    column = _column(example)
    beside = {"instruction": ("input", "history"), "prompt": ("history",), "question": ("history",)}
    used = {*ANSWERS, column, "system", "tools", *beside.get(column or "", ())}
    return [key for key, value in example.items() if key not in used and not is_nothing(value)]


def _checked(example: Mapping[str, Any]) -> str | None:
    """Return the column of the prompt; None where the answers begin with it."""
    for name in ANSWERS:
        if example.get(name) is None:
            other = " (null)" if name in example else ""
            raise TaskError(
                f"task.objective learns preferences, and this example has no {name!r}{other}; its columns are "
                f"{sorted(example)}. Expected `chosen` and `rejected`, with `prompt`, `conversations`, `instruction` "
                "or `question`"
            )
    refused = [key for key in NOT_HONOURED if key not in ANSWERS and not is_nothing(example.get(key))]
    if refused:
        raise TaskError(
            f"column {refused[0]!r} beside a preference is not honoured; take it out if it should have no effect"
        )
    prompts = [name for name in _PROMPTS if not is_nothing(example.get(name))]
    if len(prompts) > 1:
        raise TaskError(f"an example has both {prompts[0]!r} and {prompts[1]!r}; keep one, which holds the prompt")
    return _column(example)


def _column(example: Mapping[str, Any]) -> str | None:
    return next((name for name in _PROMPTS if not is_nothing(example.get(name))), None)


def _prompt(example: Mapping[str, Any], column: str) -> list[Message]:
    if column == "instruction":
        return [check_role(message) for message in instruction_of(example)]
    given = example[column]
    if column == "question" or (column == "prompt" and isinstance(given, str)):
        return [*history_of(example), user(given, column)]
    return _turns(given, column)


def _answer(given: Any, column: str, alone: bool) -> list[Message]:
    """Read an answer: a text, a message, or a list of messages; without a prompt beside it, a transcript too."""
    if not isinstance(given, str):
        return _turns(given, column)
    return _transcript(given) if alone and _TURN.match(given) else [assistant(given, column)]


def _transcript(text: str) -> list[Message]:
    """Return the turns of a transcript, without the white space round them."""
    parts = _TURN.split(text)[1:]
    return [
        {"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _turns(given: Any, column: str) -> list[Message]:
    """Read a message, or a list of messages."""
    given = from_json(given, column)
    turns = [given] if isinstance(given, Mapping) else turns_of(given, column)
    return [check_role(sharegpt_turn(turn)) for turn in turns]


def _parted(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the prompt, and the two answers without it."""
    if prompt is not None and all(answer[:1] and answer[0]["role"] == "assistant" for answer in (chosen, rejected)):
        return prompt, chosen, rejected
    common = _common(chosen, rejected)
    if prompt is None:
        if not common:
            raise TaskError(
                "'chosen' and 'rejected' begin with no common message, and there is no `prompt`: give it, or both as "
                "lists of messages (or transcripts of Human: and Assistant:) that begin with the prompt's"
            )
    elif common[-len(prompt) :] != prompt:
        raise TaskError("'chosen' or 'rejected' begins with other messages than an answer or the prompt")
    return common, chosen[len(common) :], rejected[len(common) :]


def _common(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """Return the messages with which both begin, up to the last one that is no answer: an answer may begin alike."""
    count = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while count and one[count - 1]["role"] in ("assistant", "tool"):
        count -= 1
    return list(one[:count])


def _with_answer(context: list[Message], answer: list[Message], name: str) -> list[Message]:
    """Return a conversation of the prompt and an answer, which may call tools in between.

    Raises:
        TaskError: there is no answer, it is empty, or others speak in it.
    """
    if all(is_blank(message["content"]) and "tool_calls" not in message for message in context):
        raise TaskError("the prompt is empty")
    if not answer or answer[-1]["role"] != "assistant":
        raise TaskError(f"{name!r} does not end in an answer")
    if others := [message["role"] for message in answer if message["role"] not in ("assistant", "tool")]:
        raise TaskError(f"{name!r} has a message of role {others[0]!r} behind the place where the two answers part")
    if any(LEARNED in message for message in answer):
        raise TaskError(f"a message of {name!r} has a weight or train of 0, which is not honoured in a preference")
    if any(is_blank(message["content"]) and "tool_calls" not in message for message in answer):
        raise TaskError(f"{name!r} is empty: there is nothing to learn from it")
    return [*context, *answer]
