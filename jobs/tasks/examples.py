"""Examples of text, conversations and preferences: which of the former two one is, and what of it is learned from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import close
from jobs.tasks.conversations import COLUMNS, conversation_of, is_conversation, messages_of, unused
from jobs.tasks.messages import is_nothing, text_of
from jobs.tasks.preferences import preference_of
from jobs.tasks.preferences import unused as unused_of_preference

_QUESTIONS = {"instruction", "prompt", "question", "query", "user", "human"}
_ANSWERS = {"response", "answer", "output", "completion", "assistant", "gpt"}


class ExampleReader:
    """Reads each example by its own shape."""

    def __init__(self, text_column: str | None) -> None:
        """Take the column of the text; None: `text`, where an example is no conversation."""
        self._is_given = text_column is not None
        self.column = text_column or "text"

    def is_conversation(self, example: Mapping[str, Any]) -> bool:
        """Tell a conversation from a text: a column of the text that was named makes every example a text."""
        return not self._is_given and is_conversation(example)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example that is neither text nor a conversation with an answer."""
        if self.is_conversation(example):
            conversation_of(example)
        else:
            self.text(example)

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Cut a text after the share `at` of its characters; a conversation is a whole."""
        if self.is_conversation(example):
            return None
        text = self.text(example)
        end = int(len(text) * at)
        return {**example, self.column: text[:end]}, {**example, self.column: text[end:]}

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the messages, or the text."""
        return messages_of(example) if self.is_conversation(example) else self.text(example)

    def together(self, example: Mapping[str, Any]) -> Any:
        """Return None: nothing but copies belongs together."""
        return None

    def answer(self, example: Mapping[str, Any]) -> str | None:
        """Return None: the content holds what is learned."""
        return None

    def text(self, example: Mapping[str, Any]) -> str:
        """Return the text of an example that is no conversation.

        Raises:
            TaskError: its column is missing or holds something else.
        """
        if example.get(self.column) is not None:
            return text_of(example[self.column], self.column)
        if self.column in example:
            raise TaskError(f"column {self.column!r} holds null, not text")
        raise TaskError(
            f"no text in column {self.column!r}; this example has {sorted(example)}"
            f"{close(self.column, example)}. Name the column in task.text_column"
            f"{'' if self._is_given else _shapes(example)}"
        )

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns of an example that hold something and have no effect."""
        if self.is_conversation(example):
            return unused(example)
        return [key for key, value in example.items() if key != self.column and not is_nothing(value)]

    def words(self, example: Mapping[str, Any]) -> str:
        """Return what a tokenizer may learn from: the text, or all that is said in a conversation."""
        if not self.is_conversation(example):
            return self.text(example)
        return "".join(message["content"] for message in conversation_of(example).messages)


class PreferenceReader(ExampleReader):
    """Reads each example as two answers to one prompt."""

    def __init__(self) -> None:
        super().__init__(None)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example that is no preference."""
        preference_of(example)

    def cut(self, example: Mapping[str, Any], at: float) -> None:
        """Return None: a preference is a whole."""

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the prompt with each of its answers, in one order whichever is preferred: no pair is held out while
        what it prefers, or the other way round, is learned."""
        pair = preference_of(example)
        return sorted([pair.chosen.messages, pair.rejected.messages], key=_told)

    def together(self, example: Mapping[str, Any]) -> Any:
        """Return the prompt: what all is said before the answers."""
        messages = preference_of(example).chosen.messages
        asked = (at for at, message in enumerate(messages) if message["role"] not in ("assistant", "tool"))
        return messages[: max(asked, default=0) + 1]

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return which answer is preferred."""
        return _told(preference_of(example).chosen.messages)

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns beside a preference that hold something and have no effect."""
        return unused_of_preference(example)

    def words(self, example: Mapping[str, Any]) -> str:
        """Return what a tokenizer may learn from: all that is said in both."""
        pair = preference_of(example)
        return "".join(m["content"] for each in (pair.chosen, pair.rejected) for m in each.messages)


def _told(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as one text, equal where these are, white space aside."""
    return json.dumps(_plain(messages), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Return a value of JSON with single spaces, and none at the ends, in its texts."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _shapes(example: Mapping[str, Any]) -> str:
    """Return which columns make a conversation, where an example has some of them, or others that mean the same."""
    asked, answered = (next((key for key in example if key.lower() in kind), None) for kind in (_QUESTIONS, _ANSWERS))
    if not (COLUMNS & example.keys() or (asked and answered)):
        return ""
    rename = f": rename {asked!r} and {answered!r}" if asked and answered else ""
    return (
        "; a conversation has `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
        f"{rename}"
    )
